"`torchrun -m slotnb train`: one set of files, the losses of one process, killed and resumed with another number."

import os
import subprocess
import sys
import pandas as pd
import pytest
from slotnb.core import read_json
from slotnb.runs.config import TrainConfig
from test_processes import check_equal, train

TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node']
SETTINGS = '--resolution 112 --weights random --batch_size 3 --num_epochs 4 --warmup_epochs 1 --device cpu --rounds 2'
SETTINGS = f'{SETTINGS} --space_dim 8 --num_slots 4'.split()
# the second process kills itself in the middle of the second round; the state is saved after every epoch
KILLED = """
import os, signal, sys
from slotnb import train
from slotnb.commands import runs
from slotnb.processes import joined, rank

steps, train_step = [0], train.train_step


def or_die(*args):
    steps[0] += 1
    if rank() == 1 and steps[0] == 20:  # of 12 in a round: the second step of the third epoch
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(*args)


train.train_step = or_die
with joined('cpu'):
    train.fit(runs.TrainConfig(**eval(sys.argv[1])), show_progress=False, save_every=0.0)
"""


def run(command, cache):
    env = os.environ | dict(OMP_NUM_THREADS='1', SLOTNB_CACHE=str(cache))
    return subprocess.run(command, env=env, capture_output=True, text=True)


def losses(folder):
    return [pd.read_csv(p)[['loss', 'val_mse']] for p in sorted(folder.rglob('metrics.csv'))]


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob('*') if p.is_file())


def check_same(one, other):
    assert files(one) == files(other)
    for a, b in zip(losses(one), losses(other)):
        pd.testing.assert_frame_equal(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize('n', [2, 3])
def test_the_command_trains_as_with_one_process(tmp_path, few_scenes, n):
    command = ['-m', 'slotnb', 'train', '--data_dir', str(few_scenes), *SETTINGS]
    for name, start in dict(one=[sys.executable], several=[*TORCHRUN, str(n)]).items():
        done = run([*start, *command, '--save_dir', str(tmp_path / name)], tmp_path / f'cache-{name}')
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.count('best_model.safetensors') == 1, done.stdout
    check_same(tmp_path / 'one', tmp_path / 'several')
    (config,) = [p for p in (tmp_path / 'several').rglob('config.json') if 'round1' not in str(p)]
    assert read_json(config)['trained_with'] == [f'torch, fp32, {n} processes']
    shards = {name: len(files(tmp_path / f'cache-{name}' / 'features')) for name in ('one', 'several')}
    assert shards['several'] > shards['one']  # each process wrote some


def test_killed_and_resumed_with_one_process(tmp_path, few_scenes):
    names = ('one', 'several')
    settings = dict(zip((k.removeprefix('--') for k in SETTINGS[::2]), SETTINGS[1::2]))
    settings = {k: int(v) if v.isdecimal() and k != 'resolution' else v for k, v in settings.items()}
    one, several = (settings | dict(data_dir=str(few_scenes), save_dir=str(tmp_path / name)) for name in names)
    fit = 'import sys; from slotnb.train import TrainConfig, fit; fit(TrainConfig(**eval(sys.argv[1])), False, 0.0)'
    script = tmp_path / 'killed.py'
    script.write_text(KILLED)
    assert run([sys.executable, '-c', fit, repr(one)], tmp_path).returncode == 0
    assert run([*TORCHRUN, '2', str(script), repr(several)], tmp_path).returncode
    folder = TrainConfig(**several).run_dir
    assert [len(table) for table in losses(folder)] == [2, 4]  # of the second round, and of the first
    assert run([sys.executable, '-c', fit, repr(several)], tmp_path).returncode == 0
    assert read_json(folder / 'config.json')['trained_with'] == ['torch, fp32, 2 processes', 'torch, fp32']
    assert 'begun with torch, fp32, 2 processes: the numbers may differ' in (folder / 'train.log').read_text()
    check_same(tmp_path / 'one', tmp_path / 'several')


def test_three_processes_of_which_one_has_nothing_to_do():
    check_equal(3)


OTHERS = dict(
    parts=dict(micro_batch=1),
    # 18 steps at a small rate: at the default one the loss does not fall and rounding grows from 1e-7 to 1e-2
    mlp=dict(decoder='mlp', projection='mlp', slot_init='random', lr=1e-4, num_epochs=6, warmup_epochs=2),
    # slots that are carried on depend on an argmax, so rounding is a larger difference after some 30 steps
    clips=dict(mode='video', max_frames=0, clip_length=3, loss='contrast', num_epochs=8, warmup_epochs=2),
    unused=dict(loss='test_processes:SlotsAlone'),
)


@pytest.mark.parametrize('name', OTHERS)
def test_other_models_and_losses(name):
    one, several = (train(n, **OTHERS[name])['losses'] for n in (1, 2))
    assert max(abs(a - b) for a, b in zip(one, several)) < 1e-5


def test_a_compiled_model_makes_the_same_steps():
    one, several = (train(1, num_iters=1, compile=c) for c in (False, True))
    assert several['engine'] == 'torch, fp32, torch.compile'
    assert max(abs(a - b) for a, b in zip(one['losses'], several['losses'])) < 1e-4


def test_errors_are_said_once(tmp_path, few_scenes):
    command = [*TORCHRUN, '2', '-m', 'slotnb', 'train', '--save_dir', str(tmp_path)]
    for flags, said in (
        (['--data_dir', 'nowhere'], 'nowhere'),
        (['--data_dir', str(few_scenes), *SETTINGS, '--engine', 'fast'], "engine 'fast' is for one process"),
        (['--data_dir', str(few_scenes), *SETTINGS, '--lr', '1e30'], 'the loss is nan'),
    ):
        done = run([*command, *flags], tmp_path)
        lines = [line for line in done.stderr.replace('\r', '\n').splitlines() if line.startswith('slotnb: ')]
        assert done.returncode and len(lines) == 1 and said in lines[0], done.stderr[-3000:]
