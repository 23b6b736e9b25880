"Properties of the metrics on many random segmentations, beyond the cases that nbs/41_metrics.ipynb explains."

import math
import warnings
import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.metrics import adjusted_rand_score
from slotnb.core import SlotnbError
from slotnb.metrics import ari, best_overlap, contingency, evaluate_masks, evaluate_scene, fg_ari, hard_masks, mbo, miou
from slotnb.baselines import block_masks, kmeans_masks, ground_truth_masks

SCORES = dict(ari=ari, fg_ari=fg_ari, mbo=mbo, miou=miou)


def random_case(seed, shape=(13, 17)):
    "Blobs rather than noise, so that scores of all sizes appear; ids may be missing."
    rng = np.random.default_rng(seed)

    def blobs(k):
        y, x = np.mgrid[: shape[0], : shape[1]]
        c = rng.uniform(0, shape, (k, 2))
        return rng.permutation(k + 2)[:k][((y[..., None] - c[:, 0]) ** 2 + (x[..., None] - c[:, 1]) ** 2).argmin(-1)]

    true, pred = blobs(rng.integers(1, 9)), blobs(rng.integers(1, 9))
    mix = rng.uniform(size=shape) < rng.uniform()
    return true, np.where(mix, pred, true)


def iou_by_sets(true, pred):
    "IoU of every visible object with every predicted segment, without a contingency table."

    def sets(x, skip):
        return [set(np.flatnonzero(x.ravel() == v)) for v in np.unique(x) if v != skip]

    return np.array([[len(o & p) / len(o | p) for p in sets(pred, None)] for o in sets(true, 0)])


@pytest.mark.parametrize('seed', range(150))
def test_ari_is_sklearns(seed):
    true, pred = random_case(seed)
    fg = true > 0
    assert ari(true, pred) == pytest.approx(adjusted_rand_score(true.ravel(), pred.ravel()), abs=1e-12)
    if fg.any():
        assert fg_ari(true, pred) == pytest.approx(adjusted_rand_score(true[fg], pred[fg]), abs=1e-12)
    else:
        assert math.isnan(fg_ari(true, pred))


@pytest.mark.parametrize('seed', range(150))
def test_overlaps_are_those_of_pixel_sets(seed):
    true, pred = random_case(seed)
    iou = iou_by_sets(true, pred)
    if not len(iou):
        assert math.isnan(mbo(true, pred)) and math.isnan(miou(true, pred))
        return
    assert mbo(true, pred) == pytest.approx(iou.max(1).mean(), abs=1e-12)
    assert miou(true, pred) == pytest.approx(iou[linear_sum_assignment(-iou)].sum() / len(iou), abs=1e-12)
    best = best_overlap(true, pred)
    assert best[~np.isnan(best)] == pytest.approx(iou.max(1), abs=1e-12)


@pytest.mark.parametrize('name', SCORES)
def test_names_of_segments_do_not_matter(name):
    f = SCORES[name]
    for seed in range(60):
        true, pred = random_case(seed)
        rng = np.random.default_rng(seed)
        renamed = rng.permutation(pred.max() + 4)[pred]
        objects = np.concatenate([[0], 1 + rng.permutation(true.max())])[true]
        assert f(true, renamed) == pytest.approx(f(true, pred), abs=1e-12, nan_ok=True)
        assert f(objects, pred) == pytest.approx(f(true, pred), abs=1e-12, nan_ok=True)


@pytest.mark.parametrize('name', SCORES)
def test_the_truth_scores_one_and_nothing_scores_more(name):
    f = SCORES[name]
    for seed in range(60):
        true, pred = random_case(seed)
        if not true.any():
            continue
        assert f(true, true) == pytest.approx(1, abs=1e-12)
        assert f(true, pred) <= 1 + 1e-12


def test_miou_is_at_most_mbo_and_arithmetic_of_chance():
    rng = np.random.default_rng(0)
    chance = []
    for seed in range(60):
        true, pred = random_case(seed)
        if true.any():
            assert miou(true, pred) <= mbo(true, pred) + 1e-12
        chance.append(ari(true, rng.integers(0, 6, true.shape)))
    assert abs(np.mean(chance)) < 0.01


def test_large_images_do_not_overflow():
    true = np.zeros((4096, 4096), np.uint8)
    true[:2048] = 1
    assert ari(true, true) == 1 and ari(true, true.T) == pytest.approx(0, abs=1e-6)
    assert contingency(true, true.T).tolist() == [[2048**2] * 2] * 2


def test_small_integer_types_do_not_wrap():
    true = np.arange(250, dtype=np.uint8).reshape(10, 25)
    assert contingency(true, true).trace() == 250 and mbo(true, true) == 1


def test_edge_cases_without_warnings():
    empty, one = np.zeros((6, 6), int), np.ones((6, 6), int)
    two = one.copy()
    two[:, 3:] = 2
    gap = np.where(two == 2, 3, two)  # instance 2 is listed but hidden
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        res = evaluate_scene(empty, two, [])
        assert res['ari'] == 0 and all(math.isnan(v) for k, v in res.items() if k != 'ari')
        assert fg_ari(one, two) == 0 and fg_ari(one, empty) == 1 and fg_ari(two, empty) == 0 and ari(two, empty) == 0
        res = evaluate_scene(gap, gap, ['metal', 'rubber', 'metal'])
        assert res['mbo'] == res['miou'] == res['best_overlap_metal'] == 1 and math.isnan(res['best_overlap_rubber'])
        assert math.isnan(best_overlap(gap, gap)[1])


def test_an_unmatched_object_counts_zero():
    two = np.repeat([[1, 1, 2, 2]], 4, 0)
    assert miou(two, np.where(two == 2, 7, 7)) == 0.25 and mbo(two, np.zeros_like(two)) == 0.5


def test_best_overlap_by_material_averages_the_right_objects():
    true = np.repeat([[1, 1, 2, 2, 3, 3, 0, 0]], 2, 0)
    pred = np.repeat([[1, 1, 2, 4, 5, 5, 5, 5]], 2, 0)
    res = evaluate_scene(true, pred, ['metal', 'rubber', 'rubber'])
    assert res['best_overlap_metal'] == 1 and res['best_overlap_rubber'] == 0.5
    assert 'best_overlap_metal' not in evaluate_scene(true, pred)
    with pytest.raises(SlotnbError, match='2 materials'):
        evaluate_scene(true, pred, ['metal', 'rubber'])


def test_hard_masks_upsample_as_torch_does_and_refuse_nonsense():
    masks = torch.rand(5, 12, generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.interpolate(masks.view(1, 5, 3, 4), (30, 44), mode='bilinear', align_corners=False)[
        0
    ].argmax(0)
    assert (hard_masks(masks, (30, 44), (3, 4)) == want.numpy()).all()
    assert hard_masks(masks.half().requires_grad_(), (30, 44), (3, 4)).shape == (30, 44)
    for bad, grid in ((masks, None), (masks, (5, 5)), (masks[None], (3, 4)), (masks * float('nan'), (3, 4))):
        with pytest.raises(SlotnbError):
            hard_masks(bad, (30, 44), grid)
    ok = np.ones((2, 2), int)
    for true, pred in ((ok / 2, ok), (-2 * ok, ok), (ok, -ok), (ok, ok[:1]), (ok[:0], ok[:0])):
        with pytest.raises(SlotnbError):
            contingency(true, pred)


class Scene:
    "What `evaluate_masks` needs of a scene."

    frame = 0

    def __init__(self, name, segmentation, materials):
        self.name, self.segmentation, self.materials = name, segmentation, materials


def test_evaluate_masks_names_its_source_and_keeps_the_order():
    seg = np.kron(np.array([[0, 1], [2, 0]]), np.ones((32, 32), int))
    scenes = [Scene('b', seg, ['metal', 'rubber']), Scene('a', seg, ['metal', 'metal'])]
    df = evaluate_masks(scenes, [ground_truth_masks(seg, (16, 16))] * 2, 'attn')
    assert list(df.scene) == ['b', 'a'] and list(df.columns[:4]) == ['scene', 'frame', 'ari_attn', 'fg_ari_attn']
    assert df.best_overlap_rubber_attn.isna().tolist() == [False, True]
    assert (df.fg_ari_attn > 0.99).all() and (df.mbo_attn > 0.99).all()  # all but where four segments meet in one point
    with pytest.raises(SlotnbError, match='1 sets of masks for 2 scenes'):
        evaluate_masks(scenes, [ground_truth_masks(seg, (16, 16))], 'attn')


def test_baselines_are_masks():
    rng = np.random.default_rng(0)
    feats = np.repeat(np.eye(3, 8), [100, 100, 56], 0) + rng.normal(0, 0.01, (256, 8))
    seg = np.kron(rng.integers(0, 5, (8, 8)), np.ones((8, 8), int))
    cases = [
        block_masks((16, 16)),
        block_masks((7, 9), 2, 3),
        kmeans_masks(feats, 3, 1),
        ground_truth_masks(seg, (16, 16)),
        ground_truth_masks(seg, (4, 4), soft=True),
    ]
    for m in cases:
        assert np.allclose(m.sum(0), 1) and m.min() >= 0
    assert all((m.sum(1) > 0).all() for m in cases[:3])
    parts = kmeans_masks(torch.tensor(feats), 3, 1).argmax(0)
    assert adjusted_rand_score(np.repeat([0, 1, 2], [100, 100, 56]), parts) == 1
