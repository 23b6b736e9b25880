"Which parts of the data a run is trained and scored on, and what reads no masks."

import json
import shutil
from dataclasses import asdict
import numpy as np
import pytest
from PIL import Image
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders
from slotnb.formats.detect import open_dataset
from slotnb.formats.shards import encode_png, write_shards
from slotnb.report import load_runs
from slotnb.runs.config import TrainConfig
from slotnb.runs.identity import check_same_run, run_key
from slotnb.data import Dataset, Entry
from slotnb.runs.inputs import _rows_by_scene, data_key, holds_out, open_split, prepare
from slotnb.sweep import run_status
from conftest import DATA, copy_scenes


@pytest.fixture
def parts(tmp_path):
    "Scenes in the folders a, b and test."
    root = copy_scenes(tmp_path / 'data', train=6, test=2)
    (root / 'train').rename(root / 'a')
    shutil.copytree(root / 'test', root / 'b')
    for p in (root / 'b').iterdir():
        p.rename(p.with_name(f'b_{p.name}'))
    return root


def config_of(root, **settings):
    return TrainConfig(data_dir=str(root), weights='random', resolution='56', device='cpu', **settings)


def test_parts_of_any_name(parts, tmp_path):
    config = config_of(parts, train_split='a', test_split='b', save_dir=str(tmp_path))
    data = prepare(config, False)
    assert len(data.scenes['train']) == 6 and all(n.startswith('b_') for n in data.scenes['test'].scenes)
    assert open_split(config, 'test', False).scenes == data.scenes['test'].scenes
    other = config_of(parts, train_split='a', save_dir=str(tmp_path))
    assert data_key(config) != data_key(other) and not holds_out(config)
    with pytest.raises(SlotnbError, match="has no split 'train'"):
        prepare(config_of(parts), False)


@pytest.mark.parametrize('splits', [('a', 'a'), ('', 'test'), ('a', '')])
def test_two_parts_are_needed(parts, splits):
    with pytest.raises(SlotnbError, match='must be two parts'):
        config_of(parts, train_split=splits[0], test_split=splits[1])


def test_scenes_that_are_trained_on_are_not_scored(tmp_path):
    "Without a test set the validation set is read in its place, which may be what was trained on."
    root = copy_scenes(tmp_path / 'data', train=3, test=2)
    (root / 'test').rename(root / 'val')
    with pytest.raises(SlotnbError, match="train_split 'val' and test_split 'test' share 2 scenes"):
        prepare(config_of(root, train_split='val'), False)


def test_shards_of_equal_keys_share_no_scene(tmp_path):
    for split in ('train', 'test'):
        data = KubricFolders(copy_scenes(tmp_path / 'k', **{split: 2}), split)
        data.entries = [e._replace(name=f'{i}') for i, e in enumerate(data.entries)]
        write_shards(data, tmp_path / 's', split, progress=False)
    assert len(prepare(config_of(tmp_path / 's'), False).scenes['test']) == 2


def test_the_parts_belong_to_a_run(tmp_path):
    "A run that was made before there was a choice is read, is the same run, and keeps its key."
    config = TrainConfig(save_dir=str(tmp_path))
    old = {k: v for k, v in asdict(config).items() if k not in ('train_split', 'test_split')}
    path = config.run_dir / 'config.json'
    path.parent.mkdir()
    path.write_text(json.dumps(dict(config=old, backbone={})))
    assert check_same_run(path, config=asdict(config))
    assert run_key(dict(config=old, backbone={})) == run_key(dict(config=asdict(config), backbone={}))
    assert TrainConfig(**old) == config
    changed = TrainConfig(save_dir=str(tmp_path), test_split='val')
    assert run_key(dict(config=asdict(changed), backbone={})) != run_key(dict(config=old, backbone={}))
    with pytest.raises(SlotnbError, match="test_split 'test' there, 'val' here"):
        check_same_run(path, config=asdict(changed))


def test_scores_of_several_sizes_do_not_mix(tmp_path):
    "A run without a size was scored by an earlier version: it is not finished, and a report of both is refused."
    for i, scored in enumerate((dict(ari=0.5), dict(ari=0.5, score_size=512))):
        config = TrainConfig(save_dir=str(tmp_path / f'{i}'))
        config.run_dir.mkdir(parents=True)
        about = dict(config=asdict(config), backbone=dict(weights='x'))
        (config.run_dir / 'config.json').write_text(json.dumps(about))
        (config.run_dir / 'result.json').write_text(json.dumps(scored))
        assert run_status(config) == ('finished' if i else 'started')
    with pytest.raises(SlotnbError, match='scored at several sizes'):
        load_runs(tmp_path)
    (tmp_path / '0/dinov2_vits14/result.json').unlink()
    assert len(load_runs(tmp_path)) == 1


# ---- images only


def damaged(root):
    "Masks that cannot be read."
    for p in [*root.rglob('segmentation_*.png'), *root.rglob('metadata.json'), *root.rglob('masks/*')]:
        p.write_text('damaged')


def test_images_of_kubric_folders_with_damaged_masks(tmp_path):
    root = copy_scenes(tmp_path / 'data', train=2)
    images = [s.image for s in open_dataset(root, 'train', progress=False)]
    damaged(root)
    data = open_dataset(root, 'train', progress=False, masks=False)
    assert all((s.image == im).all() and s.segmentation is None for s, im in zip(data, images, strict=True))
    assert not data.has_ground_truth
    with pytest.raises(SlotnbError):
        open_dataset(root, 'train', progress=False)[0]


@pytest.mark.parametrize('masks', ['masks/{}.png', '{}_mask.png', 'Annotations/{}.png', 'gt/{}.jpg', 'labels/{}.png'])
def test_images_beside_masks_of_any_kind(tmp_path, masks):
    "One image has none, one is damaged, one is in colors; none of them is segmented."
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / f'{i}.png')
        path = tmp_path / masks.format(i)
        path.parent.mkdir(exist_ok=True)
        if i == 1:
            path.write_text('damaged')
        elif i:
            Image.fromarray(rng.integers(0, i, (16, 16), np.uint8) * 255).save(path)
    data = open_dataset(tmp_path, None, progress=False, masks=False).check(progress=False)
    assert data.scenes == ['0', '1', '2', '3'] and not data.has_ground_truth


def test_images_of_shards_with_damaged_masks(tmp_path):
    write_shards(KubricFolders(DATA, 'test'), tmp_path, 'test', progress=False)
    tar = next(tmp_path.glob('*.tar'))
    mask = encode_png(KubricFolders(DATA, 'test')[0].segmentation)
    whole = tar.read_bytes()
    assert whole.count(mask) == 1
    tar.write_bytes(whole.replace(mask, bytes(len(mask))))
    with pytest.raises(SlotnbError):
        open_dataset(tmp_path, 'test', progress=False)[0]
    assert open_dataset(tmp_path, 'test', progress=False, masks=False)[0].segmentation is None


def test_frames_of_a_scene_are_held_out_together():
    "The model would have seen nearly the same images. One scene alone holds out frames."

    def rows(names):
        return [
            r.tolist() for r in _rows_by_scene(Dataset('scenes', [Entry(name, i, i) for i, name in enumerate(names)]))
        ]

    assert rows('aabb') == [[0, 1], [2, 3]] and rows('abc') == [[0], [1], [2]] and rows('aaa') == [[0], [1], [2]]
