"The feature card on synthetic features with known objects: with ground truth for all, some or no scenes."

import json
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from pathlib import Path
from conftest import DATA
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders, Sample
from slotnb.feature_card import card, feature_card, precision_error
from slotnb.feature_measures import (
    effective_rank,
    fit_embedding,
    foreground_iou,
    neighbour_cosine,
    outlier_norm,
    patch_labels,
    spectrum,
)
from slotnb.normalizer import Normalizer

GRID = (6, 8)
RECORD = dict(
    backbone='made_up',
    weights='file:made.up:01234567',
    layer=11,
    final_norm=True,
    resolution=[224, 224],
    grid=[7, 7],
    dim=12,
)


def made(n, seed, truth=True):
    "Scenes of 24 x 32 pixels with two boxes on a floor; 9 channels of strong noise, 3 faint ones differ by object."
    rng, scenes, feats = np.random.default_rng(seed), [], []
    for i in range(n):
        seg = np.zeros((24, 32), int)
        y, x = rng.integers(0, 3, 2) * 4
        seg[y : y + 12, x : x + 8] = 1
        seg[y + 4 : y + 16, x + 12 : x + 20] = 2
        labels = patch_labels(seg, GRID)
        f = rng.normal(size=(48, 12)) * 4
        f[:, :3] = rng.normal(size=(48, 3)) * 0.3 + rng.permutation(np.eye(3) * 4)[labels]
        image = rng.integers(0, 255, (24, 32, 3), np.uint8)
        scenes.append(Sample(f'scene_{i:04}', 0, Path('made'), image, seg if truth else None, [{}, {}]))
        feats.append(f)
    return torch.tensor(np.stack(feats)).float(), scenes


def make(n=4, train=12, truth=True, train_truth=True, record=RECORD, seeds=(0, 1), **kw):
    x, scenes = made(n, 1, truth)
    tx, ts = made(train, 2, train_truth) if train else (None, None)
    return feature_card(x, scenes, GRID, record, tx, ts, 4, seeds, show_progress=False, **kw)


@pytest.fixture(scope='module')
def whole():
    return make()


def test_a_row_for_each_normalizer(whole):
    t = whole.table()
    assert list(t.index) == list(Normalizer.kinds) and not t.isna().any().any()
    assert (
        t.loc['none', 'std'] > 2
        and abs(t.loc['instance', 'std'] - 1) < 0.05
        and t.loc['token', 'norm_max'] == pytest.approx(t.loc['token', 'norm_median'], rel=1e-3)
    )
    assert (t.filter(regex='fg_ari$') <= 1).all().all() and (t.filter(regex='_std$') >= 0).all().all()


def test_the_probe_finds_what_kmeans_does_not(whole):
    "Objects in faint channels: k-means misses them, and a linear map fitted on other scenes finds them."
    t, ceiling = whole.table(), whole.references.loc['ground truth on the grid', 'fg_ari']
    assert t.loc['none', 'kmeans_fg_ari'] < 0.3 and t.loc['none', 'probe_true_k_fg_ari'] > 0.9 * ceiling
    assert whole.references.loc['fixed blocks', 'fg_ari'] < ceiling


def test_scale_changes_the_std_alone():
    x, scenes = made(3, 1)
    a, b = (
        feature_card(x * s, scenes, GRID, RECORD, k=4, seeds=(0,), show_progress=False).table().loc['none']
        for s in (1, 8)
    )
    for name in (
        'patch_cosine',
        'neighbour_cosine',
        'effective_rank',
        'outlier_share',
        'kmeans_fg_ari',
        'components_90',
    ):
        assert a[name] == pytest.approx(b[name], rel=1e-3), name
    assert b['std'] == pytest.approx(8 * a['std'], rel=1e-3)


def test_without_ground_truth():
    c = make(truth=False)
    assert not [n for n in c.table() if 'ari' in n or 'mbo' in n or 'iou' in n] and c.references.empty
    assert any('without ground truth' in n for n in c.notes) and 'without ground truth' in str(c)
    assert [a.get_title() for a in c.figure().axes if a.get_title()][:3] == ['image', 'PCA of the tokens', 'k-means']
    c = make(train_truth=False)
    assert (
        not [n for n in c.table() if 'probe' in n]
        and 'kmeans_fg_ari' in c.table()
        and any('no probes' in n for n in c.notes)
    )


def test_ground_truth_of_some_scenes():
    "Scores are means over the scenes with ground truth; everything else is over all scenes."
    x, scenes = made(4, 1)
    part = [s if i < 2 else s._replace(segmentation=None) for i, s in enumerate(scenes)]
    a, b = (
        feature_card(f, s, GRID, RECORD, k=4, seeds=(0,), show_progress=False)
        for f, s in ((x, part), (x[:2], scenes[:2]))
    )
    assert (
        a.table().loc['none', 'kmeans_fg_ari'] == b.table().loc['none', 'kmeans_fg_ari']
        and a.table().loc['none', 'std'] != b.table().loc['none', 'std']
    )
    assert any('over 2 with ground truth' in n for n in a.notes)


def test_never_scored_on_training_scenes():
    x, scenes = made(3, 1)
    with pytest.raises(SlotnbError, match='both in train_scenes and in scenes'):
        feature_card(x, scenes, GRID, RECORD, x[:1], [scenes[2]._replace(name='another')], show_progress=False)


def test_card_of_an_own_class():
    "A record without layer and final norm, as of a class of the user's own."
    c = make(
        n=2, train=0, record=RECORD | dict(source='custom', weights='custom:01234567', layer=None, final_norm=None)
    )
    title = c.figure().subfigs[0].get_suptitle()
    assert 'class of your own, 224x224 px' in title and 'block' not in title and 'custom:01234567' in str(c)


def test_shapes_are_refused():
    x, scenes = made(3, 1)
    with pytest.raises(SlotnbError, match='do not belong to 3 scenes on a 6x6 grid'):
        feature_card(x, scenes, (6, 6), RECORD, show_progress=False)
    with pytest.raises(SlotnbError, match='do not belong to 2 scenes'):
        feature_card(x, scenes[:2], GRID, RECORD, show_progress=False)
    with pytest.raises(SlotnbError, match='at least two objects'):
        fit_embedding(x[:1], np.zeros((1, 48), int))


def test_saved(whole, tmp_path):
    whole.save(tmp_path / 'card')
    assert sorted(p.name for p in (tmp_path / 'card').iterdir()) == [
        'feature_card.csv',
        'feature_card.json',
        'feature_card.png',
    ]
    book = json.loads(
        (tmp_path / 'card/feature_card.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON')
    )
    assert (
        book['record'] == RECORD
        and book['images_per_second'] is None
        and set(book['normalizers']) == set(Normalizer.kinds)
    )
    csv = pd.read_csv(tmp_path / 'card/feature_card.csv', index_col=0)
    np.testing.assert_allclose(csv.values, whole.table().values.astype(float))
    assert plt.imread(tmp_path / 'card/feature_card.png').shape[0] > 1000


def test_one_seed_is_valid_json(tmp_path):
    make(seeds=(0,), train=0).save(tmp_path)
    json.loads((tmp_path / 'feature_card.json').read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))


def test_random_weights_and_speed_are_reported():
    c = make(
        n=2, train=0, record=RECORD | dict(weights='RANDOM WEIGHTS'), images_per_second=12.34, precision_error=0.0123
    )
    assert 'RANDOM WEIGHTS' in str(c) and 'RANDOM WEIGHTS' in [t.get_text() for t in c.figure().texts]
    assert '12.3' in str(c) and '1.2e-02' in str(c)
    c = make(n=2, train=0)
    assert (
        'not measured' in str(c)
        and 'RANDOM' not in str(c)
        and 'RANDOM WEIGHTS' not in [t.get_text() for t in c.figure().texts]
    )


def test_object_numbers_mean_nothing_across_scenes():
    x, scenes = made(12, 2)
    labels = np.stack([patch_labels(s.segmentation, GRID) for s in scenes])
    rng = np.random.default_rng(0)
    other = np.stack([rng.permutation(3)[l] for l in labels])
    a, b = (np.abs(fit_embedding(x, l, 2).transform(x[0].numpy())) for l in (labels, other))
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


def test_patch_labels_on_any_grid():
    seg = np.zeros((30, 50), int)
    seg[:, 25:] = 3
    assert patch_labels(seg, (3, 2)).tolist() == [0, 3] * 3
    assert patch_labels(seg, (7, 9)).reshape(7, 9)[:, [0, 3, 5, 8]].tolist() == [[0, 0, 3, 3]] * 7


def test_foreground_is_found():
    (x, scenes), (tx, ts) = made(4, 1), made(12, 2)
    labels, tl = (np.stack([patch_labels(s.segmentation, GRID) for s in ss]) for ss in (scenes, ts))
    x, tx = x.clone(), tx.clone()
    x[..., 5] = torch.tensor(labels > 0) * 4 - 2.0
    tx[..., 5] = torch.tensor(tl > 0) * 4 - 2.0
    assert (
        foreground_iou(tx, tl, x, labels) == 1
        and foreground_iou(tx, np.random.default_rng(0).permuted(tl, axis=1), x, labels) < 0.6
    )


def test_rank_and_cosine_know_nothing_of_the_basis():
    x = torch.randn(5, 48, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 12)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1)))[0]
    assert effective_rank(spectrum(x)) == pytest.approx(effective_rank(spectrum(x @ turn)), rel=1e-4)
    assert neighbour_cosine(x, GRID) == pytest.approx(neighbour_cosine(x @ turn, GRID), abs=1e-5)
    same = torch.ones(2, 48, 12)
    assert neighbour_cosine(same, GRID) == pytest.approx(1) and effective_rank(spectrum(same)) <= 1


def test_outliers():
    norms = torch.full((4, 100), 10.0) + torch.randn(4, 100, generator=torch.Generator().manual_seed(0)) * 0.1
    norms[2, 7] = 14
    assert (norms > outlier_norm(norms)).nonzero().tolist() == [[2, 7]] and outlier_norm(norms * 5) == pytest.approx(
        5 * outlier_norm(norms), rel=1e-5
    )


def test_precision_error():
    images = [np.full((4, 4, 3), v, np.uint8) for v in (10, 200)]

    def exact(x):
        return x.float().mean((2, 3))[:, None]

    assert precision_error(exact, exact, images) == 0 and precision_error(
        lambda x: exact(x) * 1.01, exact, images
    ) == pytest.approx(0.01, rel=1e-3)


class Colours:
    "A backbone of 8 x 8 patches: mean colour, its square, and brightness."

    device = torch.device('cpu')
    record = RECORD | dict(backbone='colours', grid=[8, 8], dim=7)

    def __call__(self, images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 8).flatten(2).transpose(1, 2)
        return torch.cat([x, x**2, x.mean(-1, keepdim=True)], -1)


def test_card_of_a_backbone(tmp_path, monkeypatch):
    "Speed is on the card only if the backbone had to run; a selection of samples is noted."
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path / 'cache'))
    test, train = KubricFolders(DATA, 'test'), KubricFolders(DATA, 'train')
    test.entries, train.entries = test.entries[:4], train.entries[:4]
    first = card(Colours(), test, tmp_path / 'card', train, max_scenes=3, batch_size=2, show_progress=False)
    assert (
        'not measured' not in first
        and first.count('3 of 4 samples') == 2
        and (tmp_path / 'card/feature_card.png').exists()
    )
    again = card(Colours(), test, tmp_path / 'card', max_scenes=2, show_progress=False, exact=Colours())
    assert 'not measured' in again and 'no probes' in again and 'error against fp32   0.0e+00' in again
    with pytest.raises(SlotnbError, match='max_scenes 0'):
        card(Colours(), test, tmp_path / 'card', max_scenes=0)
