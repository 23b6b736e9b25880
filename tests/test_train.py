"Training: exact resuming after SIGKILL, checkpoints, and that nothing is ever unpickled."

import ast, csv, os, signal, subprocess, sys, time
from dataclasses import replace
from pathlib import Path
import pytest, torch
from conftest import DATA, ROOT
from slotnb.core import SlotnbError
from slotnb.runs.config import TrainConfig
from slotnb.train import build, fit, warm_start
from slotnb.evaluate import evaluate, load_run
from slotnb.runs.folder import load_tensors

SMALL = dict(data_dir=str(DATA), num_epochs=24, warmup_epochs=2, slot_dim=64, hidden_dim=64, device='cpu')
CODE = 'import sys; from slotnb.train import *; fit(TrainConfig(**eval(sys.argv[1])), show_progress=False, save_every=float(sys.argv[2]))'


def start(config, save_every=0.0):
    return subprocess.Popen(
        [sys.executable, '-c', CODE, repr(config), str(save_every)], env=os.environ | dict(OMP_NUM_THREADS='1')
    )


def lines(path):
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize('normalizer', ['instance', 'dataset'])
def test_sigkill_and_resume_equals_uninterrupted(tmp_path, normalizer):
    whole, killed = (SMALL | dict(save_dir=str(tmp_path / name), normalizer=normalizer) for name in ('whole', 'killed'))
    assert start(whole).wait() == 0
    metrics = tmp_path / 'killed/dinov2_vits14/metrics.csv'
    for at in (5, 14):  # killed twice, at places that the saved state knows nothing of
        process = start(killed, 0.05)
        while len(lines(metrics)) <= at and process.poll() is None:
            time.sleep(0.005)
        assert process.poll() is None, 'the run was over before it could be killed'
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert len(lines(metrics)) < 25
    assert start(killed).wait() == 0
    a, b = ((tmp_path / name / 'dinov2_vits14/metrics.csv').read_bytes() for name in ('whole', 'killed'))
    assert a == b and len(a.splitlines()) == 25
    a, b = (load_run(tmp_path / name / 'dinov2_vits14').model.state_dict() for name in ('whole', 'killed'))
    assert all(a[k].equal(b[k]) for k in a)


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
    assert {p.suffix for p in run_dir.iterdir()} <= {'.safetensors', '.json', '.csv', '.log'}
    for path in (ROOT / 'slotnb').glob('*.py'):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert 'pickle' not in {n.name for n in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module != 'pickle', path
            if isinstance(node, ast.Call) and ast.unparse(node.func) == 'torch.load':
                assert any(k.arg == 'weights_only' and ast.unparse(k.value) == 'True' for k in node.keywords), path


def test_checkpoint_of_another_shape(tmp_path):
    run_dir = fit(TrainConfig(**SMALL | dict(num_epochs=1, save_dir=str(tmp_path))), False)
    text = (run_dir / 'config.json').read_text()
    assert '"slot_dim": 64' in text
    (run_dir / 'config.json').write_text(text.replace('"slot_dim": 64', '"slot_dim": 32'))
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
    "Projection, initial slots and slot attention of another run, and nothing else; a run of another shape is refused by name."
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
