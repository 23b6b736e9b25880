"Training: exact resuming after SIGKILL, checkpoints, and that nothing is ever unpickled."

import ast
import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
import pytest
import torch
from conftest import DATA, ROOT
from slotnb.core import SlotnbError, write_json
from slotnb.evaluate import evaluate, load_run
from slotnb.model import build
from slotnb.runs.checkpoints import load_tensors, warm_start
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.identity import write_about
from slotnb.train import fit

SMALL = PRESETS['version_0_1'] | dict(
    data_dir=str(DATA), num_epochs=12, warmup_epochs=2, slot_dim=64, hidden_dim=64, device='cpu'
)
# trains, and kills itself after the row of an epoch is written and before its state is saved
CODE = """
import os, signal, sys
from slotnb.runs import folder
from slotnb.runs.config import TrainConfig
from slotnb.train import fit

append, kill_at = folder._append, int(sys.argv[2])


def append_and_die(path, row):
    append(path, row)
    if row['epoch'] == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)


folder._append = append_and_die
fit(TrainConfig(**eval(sys.argv[1])), show_progress=False, save_every=float(sys.argv[3]))
"""


def run(config, kill_at=-1, save_every=0.0):
    command = [sys.executable, '-c', CODE, repr(config), str(kill_at), str(save_every)]
    return subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1')).returncode


def check_resume(tmp_path, few_scenes, settings):
    "Killed before anything was saved, with an old state, and with the last epoch's state: equal to the last digit."
    data = dict(data_dir=str(few_scenes))
    whole, killed = (SMALL | data | settings | dict(save_dir=str(tmp_path / name)) for name in ('whole', 'killed'))
    assert run(whole) == 0
    for kill_at, save_every in ((1, 1e9), (4, 0.0), (7, 1e9)):
        assert run(killed, kill_at, save_every) == -signal.SIGKILL
    assert len((tmp_path / 'killed/dinov2_vits14/metrics.csv').read_text().splitlines()) == 9
    assert run(killed) == 0
    for name in ('metrics.csv', 'epochs.safetensors'):
        a, b = ((tmp_path / side / 'dinov2_vits14' / name).read_bytes() for side in ('whole', 'killed'))
        assert a == b, name
    a, b = (load_run(tmp_path / name / 'dinov2_vits14').model.state_dict() for name in ('whole', 'killed'))
    assert all(a[k].equal(b[k]) for k in a)
    about = json.loads((tmp_path / 'killed/dinov2_vits14/config.json').read_text())
    assert len(about['trained_with']) == 1 and about['trained_with'][0].startswith(settings['engine'])


@pytest.mark.long
def test_sigkill_and_resume_equals_uninterrupted(tmp_path, few_scenes):
    "With the default engine; slow/test_resume.py does the same with engine fast."
    check_resume(tmp_path, few_scenes, dict(engine='torch'))


def test_another_engine_is_recorded(tmp_path, few_scenes):
    "A machine that computes the fast step otherwise resumes the run, and config.json says so."
    config = TrainConfig(**SMALL | dict(data_dir=str(few_scenes), num_epochs=1, save_dir=str(tmp_path)))
    path = fit(config, show_progress=False) / 'config.json'
    about = json.loads(path.read_text())
    write_about(path, about | dict(trained_with=['fast, fp32: compiled, AVX512']))
    fit(config, show_progress=False)
    assert json.loads(path.read_text())['trained_with'] == ['fast, fp32: compiled, AVX512', 'torch, fp32']
    assert 'the numbers may differ' in (path.parent / 'train.log').read_text()


def test_seed_decides(tmp_path):
    runs = [
        fit(TrainConfig(**SMALL | dict(num_epochs=2, seed=seed, save_dir=str(tmp_path / name))), False)
        for name, seed in (('a', 0), ('b', 0), ('c', 1))
    ]
    a, b, c = ((r / 'metrics.csv').read_text() for r in runs)
    assert a == b != c


def test_best_is_by_held_out_loss(tmp_path):
    run_dir = fit(TrainConfig(**SMALL | dict(num_epochs=6, save_dir=str(tmp_path))), False)
    rows = list(csv.DictReader(open(run_dir / 'metrics.csv')))
    assert load_run(run_dir).epoch == min(range(6), key=lambda i: float(rows[i]['val_mse']))


def test_test_scenes_are_never_read_by_fit(tmp_path, few_scenes):
    "Other test scenes, the same training to the last digit."
    run = lambda name: (
        fit(TrainConfig(**SMALL | dict(num_epochs=2, data_dir=str(few_scenes), save_dir=str(tmp_path / name))), False)
        / 'metrics.csv'
    ).read_text()
    first = run('a')
    for p in (few_scenes / 'test').iterdir():
        p.rename(p.with_name('other_' + p.name))
    (few_scenes / 'test/other_scene_0000/rgba_00000.png').write_bytes(
        (few_scenes / 'train/scene_0003/rgba_00000.png').read_bytes()
    )
    assert run('b') == first


def test_nothing_is_pickled(tmp_path):
    run_dir = fit(TrainConfig(**SMALL | dict(num_epochs=1, save_dir=str(tmp_path))), False)
    evaluate(run_dir, False)
    assert {p.suffix for p in run_dir.iterdir()} <= {'.safetensors', '.json', '.csv', '.log', '.lock'}
    for path in (ROOT / 'slotnb').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert 'pickle' not in {n.name for n in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module != 'pickle', path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
                assert any(k.arg == 'weights_only' and ast.unparse(k.value) == 'True' for k in node.keywords), path


def test_checkpoint_of_another_shape(tmp_path):
    run_dir = fit(TrainConfig(**SMALL | dict(num_epochs=1, save_dir=str(tmp_path))), False)
    about = json.loads((run_dir / 'config.json').read_text())
    about['config']['slot_dim'] = 32
    write_json(run_dir / 'config.json', about)
    with pytest.raises(SlotnbError, match='config.json was changed'):
        load_run(run_dir)
    del about['digest']  # of an older version
    write_json(run_dir / 'config.json', about)
    with pytest.raises(SlotnbError, match='of another model: model.project'):
        load_run(run_dir)


def test_mlp_decoder_trains_too(tmp_path):
    run_dir = fit(TrainConfig(**SMALL | dict(num_epochs=1, decoder='mlp', save_dir=str(tmp_path))), False)
    assert evaluate(run_dir, False)['mask_std'] >= 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_agrees_with_cpu(tmp_path):
    rows = []
    for device in ('cpu', 'cuda'):
        run_dir = fit(
            replace(
                TrainConfig(**SMALL | dict(num_epochs=2, weights='random')),
                device=device,
                save_dir=str(tmp_path / device),
            ),
            False,
        )
        rows.append([float(r['mse']) for r in csv.DictReader(open(run_dir / 'metrics.csv'))])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)


def few(folder, **other):
    return TrainConfig(**SMALL | dict(num_epochs=1, warmup_epochs=0, save_dir=str(folder)) | other)


def test_warm_start(tmp_path):
    """Projection, initial slots and slot attention of another run, and nothing else; a run of another shape is refused
    by name."""
    first = fit(few(tmp_path / 'first'), show_progress=False)
    before = load_tensors(first / 'best_model.safetensors')[0]
    config = few(tmp_path / 'second', decoder='mlp', seed=5, warm_start=str(first))
    model = build(config, 384, 256)
    fresh = {k: v.clone() for k, v in model.state_dict().items()}
    warm_start(model, config.warm_start)
    for k, v in model.state_dict().items():
        taken = k.startswith(('project.', 'init.', 'slot_attention.'))
        assert v.equal(before[f'model.{k}'] if taken else fresh[k]), k
    with pytest.raises(SlotnbError, match='of another model: model.project'):
        fit(few(tmp_path / 'third', slot_dim=16, warm_start=str(first)), show_progress=False)
    with pytest.raises(SlotnbError, match='nowhere/best_model.safetensors is missing'):
        fit(few(tmp_path / 'fourth', warm_start='nowhere'), show_progress=False)
