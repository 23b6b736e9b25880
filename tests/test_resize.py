"Pictures that are not square: stretched, letterboxed or cropped. A border takes part in nothing."

import json
from dataclasses import replace
from itertools import product
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from conftest import DATA
from slotnb.backbones import ViTBackbone
from slotnb.baselines import block_masks
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders, read_segmentation
from slotnb.diagnostics import feature_stats, slot_measures
from slotnb.evaluate import load_run
from slotnb.explorer.state import State
from slotnb.explorer.views import numbers
from slotnb.explorer.widget import SlotExplorer
from slotnb.features import compute_features
from slotnb.geometry import RESIZES, Frame, MiddleSquares, frame_of, inside, letterbox
from slotnb.losses import feature_mse, feature_spread
from slotnb.metrics import evaluate_masks
from slotnb.model import SlotAutoencoder
from slotnb.normalizer import LinearSpace, Moments, Normalizer
from slotnb.report import plot_masks, plot_objects, plot_rounds
from slotnb.runs.config import LETTERBOX, TrainConfig
from slotnb.runs.inputs import open_split
from slotnb.segment.segmenter import ClusterSlots
from slotnb.sweep import SweepConfig, score_floors, sweep
from slotnb.train import model_segments, validate

SMALL = '--backbone timm:test_vit --weights random --resolution 64 --num_slots 3 --slot_dim 16 --rounds 1'
SMALL = f'{SMALL} --num_epochs 1 --warmup_epochs 0 --normalizer instance --batch_size 4 --device cpu'.split()
TINY = dict(backbone='timm:test_vit', weights='random', resolution='64', num_slots=3, device='cpu')
FRAME = letterbox((200, 600), (112, 112), (8, 8))


def ask(capsys, *args):
    code = main([str(a) for a in args])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.mark.parametrize('size', [(200, 600), (600, 200), (333, 500), (480, 480), (1, 900), (31, 30)])
@pytest.mark.parametrize('grid', [(32, 32), (4, 6), (7, 3)])
def test_there_and_back(size, grid):
    frame = letterbox(size, (grid[0] * 14, grid[1] * 14), grid)
    tokens = torch.randn(frame.size[0] * frame.size[1], 3)
    placed = frame.put(tokens, -2)
    assert placed.shape == (grid[0] * grid[1], 3) and inside(placed).sum() == len(tokens)
    assert frame.cut(placed, -2).equal(tokens) and frame_of(placed, grid) == frame
    assert frame.cut(frame.put(tokens.T)).equal(tokens.T)
    scale = min(14 * g / s for g, s in zip(grid, size))
    assert all(abs(n - s * scale / 14) <= 0.5 or n == 1 for n, s in zip(frame.size, size))  # half a patch at most


def test_features_of_a_letterbox():
    size = dict(name='timm:test_vit', weights='random', resolution=64, grid_size='native')
    kept, stretched = (ViTBackbone(**size, resize=resize) for resize in ('letterbox', 'stretch'))
    square, wide = torch.rand(3, 50, 50), torch.rand(3, 20, 60)
    feats = compute_features(kept, [square, wide])
    assert feats[0].equal(compute_features(stretched, [square])[0])
    assert frame_of(feats[1], (4, 4)) == Frame((4, 4), 1, 0, (1, 4)) and kept.record['resize'] == 'letterbox'
    alone = ViTBackbone(**size | dict(resolution=(16, 64)))
    torch.testing.assert_close(feats[1][4:8], compute_features(alone, [wide])[0])  # the backbone sees no border
    assert 'resize' not in stretched.record


def test_statistics_leave_out_the_border():
    pictures = torch.randn(5, FRAME.size[0] * FRAME.size[1], 6)
    placed = FRAME.put(pictures, -2)
    torch.testing.assert_close(Moments.of(placed).variance, Moments.of(pictures).variance)
    for norm in (*(Normalizer(kind, 6) for kind in Normalizer.kinds), LinearSpace('pca', 6, 3)):
        want = norm.fit(pictures)(pictures)
        torch.testing.assert_close(FRAME.cut(norm.fit(placed)(placed), -2), want)
        assert inside(norm(placed)).equal(inside(placed))
    segments = torch.randint(0, 3, pictures.shape[:2])
    whole = FRAME.put(segments.float()).nan_to_num(-1).long()
    spaces = [LinearSpace('lda', 6, 3).fit(x, s) for x, s in ((pictures, segments), (placed, whole))]
    torch.testing.assert_close(spaces[0].directions, spaces[1].directions)
    assert feature_stats(placed) == pytest.approx(feature_stats(pictures), abs=1e-5)


def test_measures_leave_out_the_border():
    recon, target = torch.randn(2, 3, FRAME.size[0] * FRAME.size[1], 6)
    masks, slots = torch.randn(3, 4, recon.shape[1]).softmax(1), torch.randn(3, 4, 5)
    placed, own = FRAME.put(target, -2), inside(FRAME.put(target, -2))
    torch.testing.assert_close(feature_mse(FRAME.put(recon, -2), placed, own), feature_mse(recon, target))
    torch.testing.assert_close(feature_spread(placed, own), feature_spread(target))
    want, got = slot_measures(slots, masks), slot_measures(slots, FRAME.put(masks), own)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


def test_validation_and_segments_without_the_border(monkeypatch):
    "What stands for the border in the middle of the computation changes no measure and no segment."
    from slotnb import model as module

    options = dict(slot_init='farthest', decoder='linear', projection='position', border=True)
    model = SlotAutoencoder(6, (8, 8), num_slots=3, slot_dim=8, **options)
    feats = torch.cat([FRAME.put(torch.randn(3, 24, 6), -2), torch.randn(1, 64, 6)])
    row, segments = validate(model, feats, 0).row, model_segments(model, feats, 0)
    assert (segments[~inside(feats)] == -1).all() and (segments[inside(feats)] >= 0).any()
    noise = lambda x, own: torch.where(own[..., None], x, 9 * torch.randn_like(x))
    monkeypatch.setattr(module, '_without_nan', noise)
    assert validate(model, feats, 0).row == pytest.approx(row, abs=1e-5)
    assert model_segments(model, feats, 0).equal(segments)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    "Scenes with ground truth, every second one wide and every second one tall."
    root = tmp_path_factory.mktemp('shapes')
    for split in ('train', 'test'):
        for kind in ('images', 'masks'):
            (root / split / kind).mkdir(parents=True)
        scenes = KubricFolders(DATA, split)
        for i in range(6):
            part = np.s_[60:156] if i % 2 else np.s_[:, 60:156]
            Image.fromarray(scenes[i].image[part]).save(root / split / f'images/{i}.png')
            Image.fromarray(scenes[i].segmentation[part].astype(np.uint8)).save(root / split / f'masks/{i}.png')
    return root


@pytest.fixture(scope='module')
def shaped_runs(tmp_path_factory, shapes):
    "Runs with a letterbox and with a crop on pictures that are not square, evaluated."
    root = tmp_path_factory.mktemp('runs')
    for resize in ('letterbox', 'crop'):
        args = ['train', *SMALL, '--data_dir', shapes, '--save_dir', root / f'{resize}-seed0', '--resize', resize]
        assert main([str(a) for a in args]) == 0
    return root


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "A folder of wide pictures, and one of squares."
    root, scenes = tmp_path_factory.mktemp('pictures'), KubricFolders(DATA, 'train')
    for name, size in dict(wide=(180, 60), square=(64, 64)).items():
        (root / name).mkdir()
        for i in range(12):
            Image.fromarray(scenes[i].image).resize(size).save(root / name / f'{i}.png')
    (root / 'wide/notes.txt').touch()
    return root


def test_train_with_a_letterbox(tmp_path, folders, capsys):
    args = ['train', *SMALL, '--data_dir', folders / 'wide', '--save_dir', tmp_path]
    code, out, err = ask(capsys, *args, '--batch_size', 64)
    assert code == 0 and 'each step takes all' in out + err and 'slots per image after merging' in out
    for note in ('not read: 1 .txt', 'are held out as test'):
        assert (out + err).count(note) == 1  # once, and not once for training and once for evaluation
    run_dir = tmp_path / 'timm_test_vit'
    about = json.loads((run_dir / 'config.json').read_text())
    assert about['config']['resize'] == about['backbone']['resize'] == 'letterbox'  # by itself
    result = json.loads((run_dir / 'result.json').read_text())
    assert all(np.isfinite(v) for v in result.values() if isinstance(v, float))
    assert np.isfinite(pd.read_csv(run_dir / 'metrics.csv').to_numpy(float)).all()
    for i in range(12):
        assert read_segmentation(run_dir / f'masks/labels/{i}.png').shape == (60, 180)
    segmented = load_run(run_dir).segment(folders / 'wide/3.png', refine=False)
    assert segmented.masks.shape == (3, 1, 4) and segmented.masks.isfinite().all()
    torch.testing.assert_close(segmented.masks.sum(0), torch.ones(1, 4))
    assert (segmented.labels == read_segmentation(run_dir / 'masks/labels/3.png')).shape == (60, 180)
    assert ask(capsys, *args, '--batch_size', 64, '--resize', 'crop')[0] == 2  # another run


def test_squares_give_the_same_numbers(tmp_path, folders, capsys):
    seen = []
    for resize in ('stretch', 'letterbox', 'crop'):
        args = ['train', *SMALL, '--data_dir', folders / 'square', '--save_dir', tmp_path / resize]
        assert ask(capsys, *args, '--resize', resize)[0] == 0
        run_dir = tmp_path / resize / 'timm_test_vit'
        result = json.loads((run_dir / 'result.json').read_text())
        del result['seconds_per_epoch'], result['digest']
        labels = [read_segmentation(run_dir / f'masks/labels/{i}.png').tolist() for i in range(12)]
        seen.append([(run_dir / 'metrics.csv').read_text(), result, labels])
    assert seen[0] == seen[1] == seen[2]


def test_floors_without_the_border(shapes, few_scenes):
    "Every method sees the picture's own patches; pictures without a border have the scores of resize stretch."
    config = TrainConfig(**TINY, data_dir=str(shapes), resize='letterbox')
    table = score_floors('timm:test_vit', config, [0], False).set_index('method')
    scenes = [*open_split(config, 'test', False)]
    grids = [(2, 4) if s.image.shape[0] == 96 else (4, 2) for s in scenes]
    want = [evaluate_masks([s], [block_masks(g, min(3, g[0]), g[1])], 'masks', g) for s, g in zip(scenes, grids)]
    assert table.mbo_masks['12 fixed blocks'] == pytest.approx(pd.concat(want).mbo_masks.mean())
    best = table.ari_masks['ground truth on the grid']
    assert table.filter(regex='ari|mbo|miou').notna().all(axis=None) and best == table.ari_masks.max()
    square = replace(config, data_dir=str(few_scenes))
    boxed, stretched = (score_floors('timm:test_vit', replace(square, resize=r), [0], False) for r in RESIZES[1::-1])
    pd.testing.assert_frame_equal(boxed, stretched)


def test_report_draws_pictures_without_the_border(shaped_runs, shapes):
    for resize, sizes in dict(letterbox=[(4, 2), (2, 4)], crop=[(4, 4), (4, 4)]).items():
        run_dir = shaped_runs / f'{resize}-seed0/timm_test_vit'
        scenes = [*open_split(load_run(run_dir).config, 'test', False)]
        panels = [ax.images[0].get_array() for ax in plot_masks(run_dir, scenes, [0, 1]).axes]
        assert all(np.isfinite(x).all() for x in panels)
        for i, size in enumerate(sizes):  # image, ground truth, segments, three slots
            row = panels[6 * i : 6 * i + 6]
            assert {x.shape[:2] for x in row[:3]} == {scenes[i].image.shape[:2]}
            assert {x.shape for x in row[3:]} == {size}
        for draw in (plot_objects, plot_rounds):
            for ax in draw(run_dir, scenes, [0, 1]).axes:
                assert ax.images[0].get_array().shape[:2] in {s.image.shape[:2] for s in scenes[:2]}


def test_explorer_without_the_border(shaped_runs, shapes):
    "Its scores are those of `evaluate`, and its pictures have the shape of the picture."
    run_dir = shaped_runs / 'letterbox-seed0/timm_test_vit'
    explorer, table = SlotExplorer(run_dir), pd.read_csv(run_dir / 'test_scenes.csv')
    viewer = explorer.viewer()
    for i, source in product(range(6), State.sources):
        shown = viewer.output(State(scene=i, source=source))
        assert shown.grid == ((2, 4) if i % 2 else (4, 2)) and shown.labels.shape == shown.sample.image.shape[:2]
        scores = numbers(shown)
        assert np.isfinite([v for k, v in scores.items() if 'best_overlap' not in k]).all()
        for name in ('fg_ari', 'ari', 'mbo'):
            assert scores[name] == pytest.approx(table[f'{name}_{source}'][i], abs=0.01)
    explorer.state = dict(scene=1)
    assert {p.image.shape[1] / p.image.shape[0] for k, p in explorer.pictures.items() if 'slot' in k or 'pca' in k} == {
        2
    }
    explorer._on_message(explorer.gallery, dict(kind='click', key='image', x=0.99, y=0.99), [])
    assert explorer.error == '' and explorer.state['patch'] == 7 and 'row 1, column 3' in explorer.page.query
    explorer.controls['scene'].value = 2  # a tall picture: the patch at the same place
    assert explorer.error == '' and explorer.state['patch'] == 5 and 'row 2, column 1' in explorer.page.query
    explorer.add_picture(shapes / 'test/images/1.png')
    assert explorer.error == '' and explorer.pictures['slot-0'].image.shape[:2] == (128, 256)  # 2 x 4, stamped
    segmented = load_run(run_dir).segment(shapes / 'test/images/1.png')
    assert (viewer.output(explorer.current).labels == segmented.labels).all()
    explorer.state = dict(view='training')
    assert explorer.error == ''
    for p in explorer.pictures.values():
        assert max(p.image.shape[:2]) / min(p.image.shape[:2]) > 1.9  # no square, so no border
    other = SlotExplorer(shaped_runs / 'crop-seed0/timm_test_vit')
    assert other.error == '' and {p.image.shape[0] == p.image.shape[1] for p in other.pictures.values()} == {True}


def test_crop_is_of_the_data():
    "Image and ground truth are cropped together; labels outside of the middle square are 0."
    sample = KubricFolders(DATA, 'test')[0]
    wide = sample._replace(image=sample.image[:100], segmentation=sample.segmentation[:100])

    class One(KubricFolders):
        def read(self, entry):
            return wide

    middle = MiddleSquares(One(DATA, 'test'))[0]
    assert middle.image.shape == (100, 100, 3)
    assert (middle.image == wide.image[:, 78:178]).all()
    assert (middle.segmentation == wide.segmentation[:, 78:178]).all()
    data = open_split(TrainConfig(data_dir=str(DATA), resize='crop'), 'test', False)
    assert data.fingerprint(False) == KubricFolders(DATA, 'test').fingerprint(False)  # squares: the same features


def test_segment_a_wide_picture_in_each_way():
    run, wide = load_run('movi_a'), KubricFolders(DATA, 'test')[0].image[60:145]
    found = {r: run.segment(wide, resize=r, device='cpu') for r in ('stretch', 'letterbox', 'crop')}
    for s in found.values():
        assert s.labels.shape == wide.shape[:2] and s.num_segments > 0
        assert set(s.table().slot) <= set(range(len(s.masks)))
    assert {r: tuple(s.masks.shape[1:]) for r, s in found.items()} == dict(
        stretch=(32, 32), letterbox=(11, 32), crop=(32, 32)
    )
    outside = found['crop'].labels.copy()
    outside[found['crop'].part] = 0
    assert not outside.any()
    plain = run.segment(wide[:, 85:170], device='cpu')
    assert (found['crop'].labels[:, 85:170] == plain.labels).all()


def test_clusters_of_a_letterbox():
    tokens = torch.randn(24, 5)
    placed, alone = ClusterSlots(3)(FRAME.put(tokens, -2)), ClusterSlots(3)(tokens)
    assert FRAME.cut(placed.masks).equal(alone.masks) and placed.slots.equal(alone.slots)


def test_refused(tmp_path, folders, capsys):
    other = dict(slot_attention='implicit', slot_init='kmeans', decoder='transformer', target='learned_instance')
    for name, value in (other | dict(loss='m:L', engine='fast', normalizer='m:N')).items():
        with pytest.raises(SlotnbError, match=f'{name} .* does not leave out the border'):
            TrainConfig(resize='letterbox', **{name: value})
        assert value not in LETTERBOX[name]
    for wrong in ('pad', 'auto'):
        with pytest.raises(SlotnbError, match='stretch, letterbox, crop'):
            TrainConfig(resize=wrong)
    with pytest.raises(SlotnbError, match='does not leave out the border'):
        sweep(SweepConfig(str(tmp_path / 'runs'), set=('decoder=slot_mixer',), resize='letterbox'), False)
    assert not (tmp_path / 'runs').exists()
    code, _, err = ask(capsys, 'features', '--card', '--resize', 'letterbox', '--weights', 'random')
    assert code == 2 and 'no border' in err
    code, _, err = ask(capsys, 'segment', folders / 'wide', '--resize', 'pad', '--out', tmp_path / 'masks')
    assert code == 2 and 'stretch, letterbox, crop' in err


def test_a_part_that_has_no_letterbox_is_stretched_and_said(tmp_path, folders, capsys):
    args = ['train', *SMALL, '--data_dir', folders / 'wide', '--save_dir', tmp_path, '--decoder', 'slot_mixer']
    code, out, err = ask(capsys, *args)
    assert code == 0 and 'this decoder has no letterbox' in out + err
    assert json.loads((tmp_path / 'timm_test_vit/config.json').read_text())['config']['resize'] == 'stretch'
