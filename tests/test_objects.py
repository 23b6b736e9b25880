"The default recipe: layers together, the discriminant space, rounds, the start of the slots, merging."

import json
import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from conftest import DATA
from slotnb.backbones import ViTBackbone
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders
from slotnb.evaluate import evaluate, load_run
from slotnb.finer_grid import ShiftedBackbone, fine_attention
from slotnb.model import SlotAutoencoder
from slotnb.normalizer import LinearSpace, segment_scatter
from slotnb.refine import (
    BACKGROUND_RULES,
    background_slot,
    merge_slots,
    refine_masks,
    segment_labels,
    watershed_edges,
)
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.segment.result import image_labels
from slotnb.slot_attention import FarthestInit
from slotnb.train import fit

SMALL = dict(resolution='112', weights='random', batch_size=4, num_epochs=3, warmup_epochs=1, device='cpu')


@pytest.mark.parametrize('backbone', ['dinov2_vits14', 'dino_vits16', 'clip_vitb16'])
def test_every_backbone_runs_the_recipe(tmp_path, few_scenes, backbone):
    "With random weights: the code path, not a result."
    size = '112' if backbone == 'dinov2_vits14' else '128'
    config = TrainConfig(
        **SMALL
        | dict(backbone=backbone, resolution=size, data_dir=str(few_scenes), save_dir=str(tmp_path), num_epochs=1)
    )
    run_dir = fit(config, show_progress=False)
    result = evaluate(run_dir, show_progress=False)
    assert {f'{m}_{k}' for m in ('ari', 'fg_ari', 'mbo') for k in ('attn', 'merged', 'refined')} <= set(result)
    assert 1 <= result['merged_slots'] <= 11 and result['test_fvu'] > 0
    loaded = load_run(run_dir)
    assert loaded.record['layer'] == [8, 11] and loaded.record['grid'] == [8, 8]
    assert loaded.normalizer.out_dim == 32 and loaded.model.decoder.linear.out_features == 32
    for r in (1, 2):
        assert load_run(run_dir / f'round{r}' / run_dir.name).config.rounds == r
    image = KubricFolders(DATA, 'test')[0].image
    fine, plain = (loaded.segment(image, shifts=n, device='cpu') for n in (2, 1))
    assert fine.masks.shape[1:] == (16, 16) and plain.masks.shape[1:] == (8, 8)
    torch.testing.assert_close(fine.masks.sum(0), torch.ones(16, 16))
    assert fine.labels.shape == plain.labels.shape == image.shape[:2]


def test_layers_together_are_those_of_one_by_one():
    image = torch.from_numpy(KubricFolders(DATA, 'test')[0].image).permute(2, 0, 1)[None]
    both = ViTBackbone('dinov2_vits14', layer='-1,-4', resolution=112)(image)
    last, middle = (ViTBackbone('dinov2_vits14', layer=layer, resolution=112)(image) for layer in (11, 8))
    native = ViTBackbone('dinov2_vits14', layer='-4,-1', resolution=112, grid_size='native')
    assert both.shape == (1, 256, 768) and native(image).shape == (1, 64, 768)
    tokens = native(image)
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, 64))
    one = ViTBackbone('dinov2_vits14', layer=8, resolution=112, grid_size='native')(image)
    torch.testing.assert_close(tokens[..., :384], F.normalize(one, dim=-1) / 2**0.5, atol=1e-5, rtol=1e-4)
    assert last.shape == middle.shape == (1, 256, 384)
    for wrong, why in (('12', 'does not exist'), ('1,-11', 'twice'), ('', 'must be a block')):
        with pytest.raises(SlotnbError, match=why):
            ViTBackbone('dinov2_vits14', layer=wrong)


def test_the_space_solves_the_generalized_eigenproblem():
    gen = torch.Generator().manual_seed(0)
    x = torch.randn(8, 60, 10, generator=gen) * torch.linspace(1, 3, 10)
    labels = torch.randint(-1, 4, (8, 60), generator=gen)
    x += torch.randn(8, 4, 10, generator=gen)[torch.arange(8)[:, None], labels.clamp(min=0)]
    space = LinearSpace('lda', 10, dim=4).fit(x, labels)
    within, between = segment_scatter(x, labels)
    # the same two matrices, written out
    w, b = np.zeros((10, 10)), np.zeros((10, 10))
    for tokens, own in zip(x.double().numpy(), labels.numpy()):
        means = {i: tokens[own == i].mean(0) for i in range(4)}
        back = np.cov(tokens[own == 0].T, bias=True)
        front = np.concatenate([tokens[own == i] - means[i] for i in (1, 2, 3)])
        w += (back + front.T @ front / len(front)) / 2 / 8
        b += np.cov(np.stack([*means.values()]).T, bias=True) / 8
    np.testing.assert_allclose(within, w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(between, b, rtol=1e-4, atol=1e-6)
    w += 0.01 * np.trace(w) / 10 * np.eye(10)
    values, vectors = scipy.linalg.eigh(b, w)
    want = vectors[:, ::-1][:, :4] * np.sqrt(values[::-1][:4] / (1 + values[::-1][:4]))
    got = space.directions.numpy()
    np.testing.assert_allclose(np.abs((want * got).sum(0)), (want**2).sum(0), rtol=1e-3)
    assert space(x).flatten(0, 1).var(0).mean().sqrt().item() == pytest.approx(1, rel=1e-3)


def test_inverse_is_the_regression_on_the_projection():
    x = torch.randn(4, 50, 8) @ torch.randn(8, 8)
    space = LinearSpace('pca', 8, dim=3).fit(x)
    z = torch.cat([space(x).flatten(0, 1), torch.ones(200, 1)], 1)
    want = z @ torch.linalg.lstsq(z, x.flatten(0, 1)).solution
    torch.testing.assert_close(space.inverse(space(x)).flatten(0, 1), want, atol=1e-3, rtol=1e-3)


def test_farthest_centers_are_those_of_a_plain_loop():
    x = torch.randn(3, 40, 5)
    init = FarthestInit(6, 5).eval()
    for tokens, got in zip(x, init.centers(x)):
        centers = [tokens.mean(0)]
        for _ in range(5):
            centers.append(max(tokens, key=lambda t: min((t - c).norm().item() for c in centers)))
        torch.testing.assert_close(got, torch.stack(centers))


def test_drawn_centers_follow_the_power_of_the_distance():
    tokens = torch.tensor([[0.0], [0.0], [3.0], [6.0]]).expand(20000, 4, 1) - 2.25  # the mean is 0
    init = FarthestInit(2, 1, power=2.0)
    drawn = init.centers(tokens, init.draw(20000, torch.Generator().manual_seed(0)))[:, 1, 0]
    distance = torch.tensor([2.25, 2.25, 0.75, 3.75]).square()
    share = torch.tensor([(drawn == v).float().mean() for v in (-2.25, 0.75, 3.75)])
    want = torch.stack([distance[:2].sum(), distance[2], distance[3]]) / distance.sum()
    torch.testing.assert_close(share, want, atol=0.02, rtol=0)


def test_merging_keeps_what_is_different_and_joins_what_is_the_same():
    grid, gen = (12, 12), torch.Generator().manual_seed(0)
    true = np.zeros(grid, int)
    true[2:6, 2:6], true[2:6, 8:11], true[8:11, 4:8] = 1, 2, 3
    colors = torch.eye(8)[:4] * 5
    feats = colors[true.ravel()] + 0.3 * torch.randn(144, 8, generator=gen)
    over = true.copy()
    over[6:][true[6:] == 0] = 4  # the floor in two halves
    over[2:6, 2:4] = 5  # an object in two halves
    masks = F.one_hot(torch.tensor(over.ravel()), 7).T.float()  # and a slot without any patch
    merged = merge_slots(masks, feats, grid)
    assert merged.shape == masks.shape
    torch.testing.assert_close(merged.sum(0), torch.ones(144))
    owner = merged.argmax(0).numpy()
    pairs = {(a, b) for a, b in zip(owner, true.ravel())}
    assert len(pairs) == 4 and len({a for a, _ in pairs}) == 4  # one slot per thing
    assert background_slot(merged, grid) == owner[0]
    labels = segment_labels(merged, grid)
    assert (
        sorted(labels.unique().tolist()) == [0, 1, 2, 3]
        and (labels.numpy() == 0).tolist() == (true.ravel() == 0).tolist()
    )
    torch.testing.assert_close(merge_slots(merged, feats, grid), merged)  # nothing is left to merge


@pytest.fixture
def close_up():
    "Two alike objects of one slot at opposite sides of a floor; the floor has the most patches, of the border too."
    owner = np.zeros((16, 16), int)
    owner[4:12, :3], owner[4:12, 13:], owner[7:9, 7:9] = 1, 1, 2
    return torch.eye(3)[torch.tensor(owner.ravel())].T, owner


def test_rules_for_the_background(close_up):
    masks, owner = close_up
    named = {rule: background_slot(masks, (16, 16), rule=rule) for rule in BACKGROUND_RULES}
    assert named == dict(spread=1, border=0, largest=0, agreement=None, none=None)
    y, x = np.mgrid[-1:1:16j, -1:1:16j]
    spread = [y[owner == k].var() + x[owner == k].var() for k in (0, 1)]
    edge = np.ones((16, 16), bool)
    edge[1:-1, 1:-1] = False
    assert spread[1] > spread[0] and np.bincount(owner[edge]).argmax() == np.bincount(owner.ravel()).argmax() == 0
    floor = masks.clone()
    floor[0], floor[1] = masks[:2].sum(0), 0
    assert {r: background_slot(floor, (16, 16), rule=r) for r in BACKGROUND_RULES} == dict.fromkeys(named, 0) | dict(
        none=None
    )
    with pytest.raises(SlotnbError, match="background 'middle' is unknown; choose one of spread, border"):
        background_slot(masks, (16, 16), rule='middle')


@pytest.mark.parametrize('refine', [True, False])
def test_no_background_means_no_label_0(close_up, refine):
    masks, owner = close_up
    image = np.array([[60, 60, 60], [200, 30, 30], [30, 30, 200]], np.uint8)[owner].repeat(8, 0).repeat(8, 1)

    def labels(rule):
        found = image_labels(image, masks, (16, 16), refine, 64, background=rule)
        return found[60, 10], found[60, 120], found[60, 45], found

    left, right, floor, found = labels('spread')
    assert left == right == 0 < floor
    left, right, floor, found = labels('border')
    assert floor == 0 < min(left, right) and (left != right) == refine
    left, right, floor, found = labels('agreement')
    assert found.min() == 1 and len({left, right, floor}) == (3 if refine else 2)
    assert np.array_equal(np.unique(found), np.arange(1, found.max() + 1))
    assert np.array_equal(found, labels('none')[-1])


def test_one_slot_for_the_whole_image_is_refused_by_nothing():
    masks = torch.zeros(3, 16)
    masks[1] = 1
    assert merge_slots(masks, torch.randn(16, 4), (4, 4)).equal(masks)
    assert segment_labels(masks, (4, 4)).eq(0).all()
    with pytest.raises(SlotnbError, match='no image has two segments'):
        LinearSpace('lda', 4).fit(torch.randn(2, 16, 4), torch.zeros(2, 16, dtype=torch.long))


def test_training_mode_draws_and_evaluation_mode_does_not():
    model = SlotAutoencoder(8, (4, 6), 4, 16, slot_init='farthest', decoder='linear', projection='position')
    x = torch.randn(2, 24, 8)
    assert not model.train()(x).slots.equal(model(x).slots)
    assert model.eval()(x).slots.equal(model(x).slots)


def test_presets_and_layers_on_the_command_line(tmp_path, few_scenes, capsys):
    args = ['train', f'--data_dir={few_scenes}', f'--save_dir={tmp_path}', '--weights=random', '--resolution=112']
    args += ['--num_epochs=1', '--warmup_epochs=0', '--device=cpu']
    assert main([*args, '--preset', 'version_0_1', '--num_slots=4', '--layer=-1,-4']) == 0
    settings = json.loads((tmp_path / 'dinov2_vits14/config.json').read_text())['config']
    changed = dict(num_slots=4, layer='-1,-4', resolution='112', num_epochs=1, warmup_epochs=0)
    assert {k: settings[k] for k in PRESETS['version_0_1'] | changed} == PRESETS['version_0_1'] | changed
    assert 'merged masks' in capsys.readouterr().out


def test_tokens_of_moved_images_interleave():
    net = ViTBackbone('dinov2_vits14', 'random', resolution=(56, 70), grid_size='native', device='cpu')
    fine = ShiftedBackbone(net)
    image = torch.rand(1, 3, 56, 70, generator=torch.Generator().manual_seed(0))
    assert fine.grid == (8, 10) and fine.record['shifts'] == 2 and 'shifts' not in net.record
    tokens, padded = fine(image).unflatten(1, (8, 10)), F.pad(net.preprocess(image), (7, 7, 7, 7), mode='reflect')
    for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):  # moved by -4 and +3 pixels: half a patch of 14 apart
        moved = net.tokens(padded[..., 3 + 7 * y : 59 + 7 * y, 3 + 7 * x : 73 + 7 * x])
        torch.testing.assert_close(tokens[:, y::2, x::2].flatten(1, 2), moved)
    with pytest.raises(SlotnbError, match='cannot be shifted'):
        ShiftedBackbone(ViTBackbone('dinov2_vits14', 'random', resolution=56, grid_size=16, device='cpu'))
    with pytest.raises(SlotnbError, match='1 to 8'):
        ShiftedBackbone(net, 0)


@pytest.mark.parametrize('projection', ['position', 'linear'])
def test_fine_masks_follow_the_slots_of_the_mean_tokens(projection):
    torch.manual_seed(0)
    model = SlotAutoencoder(6, (4, 6), 4, 16, slot_init='farthest', decoder='linear', projection=projection).eval()
    tokens = torch.randn(2, 8 * 12, 6)
    masks, slots = fine_attention(model, tokens)
    coarse = tokens.reshape(2, 4, 2, 6, 2, 6).mean((2, 4)).flatten(1, 2)
    torch.testing.assert_close(slots, model(coarse).slots)
    torch.testing.assert_close(masks.sum(1), torch.ones(2, 96))
    same, _ = fine_attention(model, coarse, factor=1)
    torch.testing.assert_close(same, model(coarse).attn)
    with pytest.raises(SlotnbError, match='feats has shape'):
        fine_attention(model, coarse)


def test_a_watershed_finds_the_edge_and_is_off_by_default():
    image = np.full((64, 64, 3), 90, np.uint8)
    image[20:44, 20:44] = (200, 60, 60)
    true = (image[..., 0] == 200).astype(int)
    loose = np.zeros((64, 64), int)
    loose[18:45, 22:46] = 1
    better = watershed_edges(image, loose)
    assert (better != true).sum() < (loose != true).sum() / 4
    halves = np.zeros((64, 64), int)
    halves[:, 32:] = 2
    assert set(np.unique(watershed_edges(image, halves))) == {0, 2}  # labels keep their numbers
    masks = torch.rand(3, 64, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(refine_masks(image, masks), refine_masks(image, masks, watershed=0))
    assert not np.array_equal(refine_masks(image, masks), refine_masks(image, masks, watershed=4))
