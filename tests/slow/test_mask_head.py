"A mask head of a finished run: trained, scored, used by the commands, and refused where it cannot be used."

import shutil
import numpy as np
import pytest
from conftest import finished_run
from slotnb.cli import main
from slotnb.core import read_json
from slotnb.data import read_segmentation
from slotnb.evaluate import load_run
from slotnb.formats.detect import open_dataset
from slotnb.mask_head.head import HEAD_FILE, MaskHead

TINY = dict(weights='random', resolution='56', num_slots=4, hidden_dim=16, num_epochs=1, normalizer='pca', device='cpu')


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory):
    "A finished run with a mask head."
    folder = finished_run(tmp_path_factory.mktemp('head'), 'run', TINY).run_dir
    assert main(['mask_head', str(folder), '--steps', '3']) == 0
    return folder


def test_head_is_scored_and_another_training_gives_the_same(run_dir, capfd):
    scores, file = read_json(run_dir / 'mask_head.json'), (run_dir / HEAD_FILE).read_bytes()
    assert {f'{m}_{k}' for m in ('fg_ari', 'ari', 'mbo') for k in ('refined', 'head')} <= set(scores)
    refined = read_json(run_dir / 'result.json')
    assert all(np.isclose(scores[f'{m}_refined'], refined[f'{m}_refined']) for m in ('fg_ari', 'ari', 'mbo'))
    assert main(['mask_head', str(run_dir), '--steps', '3']) == 0
    assert (run_dir / HEAD_FILE).read_bytes() == file
    assert 'mask head: FG-ARI' in capfd.readouterr().out


def test_segment_writes_the_segments_of_the_head(run_dir, tmp_path, capfd):
    scene = open_dataset(run_dir.parents[1] / 'data', 'test', progress=False)[0]
    picture = tmp_path / 'picture.png'
    shutil.copy(scene.path, picture)
    args = ['segment', str(picture), '--run', str(run_dir), '--device', 'cpu']
    assert main([*args, '--out', str(tmp_path / 'masks'), '--mask_head']) == 0
    assert main([*args, '--out', str(tmp_path / 'slots')]) == 0
    found, slots = (read_segmentation(tmp_path / kind / 'labels/picture.png') for kind in ('masks', 'slots'))
    want = MaskHead.load(run_dir / HEAD_FILE).labels(scene.image, slots == 0)
    assert (found == want).all() and not (found == slots).all()
    assert (load_run(run_dir).segment(scene.image, mask_head=True, device='cpu').labels == want).all()
    assert main([*args, '--out', str(tmp_path / 'slots'), '--mask_head']) == 2  # never mixed in one folder
    assert 'mask_head' in capfd.readouterr().err


def test_what_is_refused(run_dir, tmp_path, capfd):
    picture = next((run_dir.parents[1] / 'data/test').rglob('*.png'))
    bare = shutil.copytree(run_dir, tmp_path / 'bare')
    (bare / HEAD_FILE).unlink()
    out = ['--out', str(tmp_path / 'masks'), '--device', 'cpu']
    for args, why in (
        (['segment', str(picture), '--run', str(bare), '--mask_head', *out], f'slotnb mask_head {bare}'),
        (['segment', str(picture), '--run', 'spectral', '--mask_head', *out], 'spectral has none'),
        (['segment', str(picture), '--run', str(run_dir), '--mask_head', '--no_refine', *out], 'no_refine'),
        (['mask_head', str(tmp_path / 'none')], 'does not exist'),
        (['mask_head', str(run_dir), '--steps', '0'], 'at least 1'),
    ):
        assert main(args) == 2
        assert why in capfd.readouterr().err
    flipped = bytearray((run_dir / HEAD_FILE).read_bytes())
    flipped[-9] ^= 1
    (bare / HEAD_FILE).write_bytes(flipped)
    assert main(['segment', str(picture), '--run', str(bare), '--mask_head', *out]) == 2
    assert HEAD_FILE in capfd.readouterr().err


def test_another_dataset_is_refused(run_dir, tmp_path, capfd):
    removed = sorted((run_dir.parents[1] / 'data/train').iterdir())[0]
    shutil.move(removed, tmp_path / removed.name)
    try:
        assert main(['mask_head', str(run_dir), '--steps', '3']) == 2
        assert "those of the split 'train' have changed" in capfd.readouterr().err
    finally:
        shutil.move(tmp_path / removed.name, removed)
