"""Kills and damaged files: whatever happens to a run, the same command ends in the same digits, or in one sentence.

The processes are forked from one that has only imported slotnb, so that hundreds of them cost little."""

import os
import subprocess
import sys
from conftest import copy_scenes

TINY = dict(backbone='timm:test_vit', weights='random', resolution='64', normalizer='lda', rounds=2, device='cpu')
TINY |= dict(num_slots=3, slot_dim=8, hidden_dim=8, space_dim=4, num_epochs=3, warmup_epochs=1, batch_size=4)
HELPERS = """
import os, random, signal, sys, time
from pathlib import Path
import timm, torch._dynamo  # what training imports late
from slotnb.core import SlotnbError
from slotnb.evaluate import evaluate
from slotnb.runs.config import TrainConfig
from slotnb.train import fit

settings = eval(sys.argv[1])


def child(work):
    "Exit code of a forked process that does `work`; negative: the signal that ended it."
    pid = os.fork()
    if not pid:
        code = 1
        try:
            work()
            code = 0
        except SlotnbError as e:
            print('refused:', e, flush=True)
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train(folder, save_every=0.0):
    config = TrainConfig(**settings, save_dir=folder)
    fit(config, False, save_every)
    evaluate(config.run_dir, False)
"""
KILLS = """
before_write = os.replace


def killed_at_write(folder, n):
    "Ends without cleaning up before the n-th file gets its name, or, for odd calls, after it."
    count = [0]

    def replace(a, b):
        count[0] += 1
        if count[0] == n:
            os.kill(os.getpid(), signal.SIGKILL)
        before_write(a, b)
        if count[0] == -n:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace
    train(folder)


def killed_after(folder, seconds):
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, seconds)
    train(folder, save_every=0.05)


assert child(lambda: train('whole')) == 0
start = time.perf_counter()
assert child(lambda: train('write0')) == 0  # with all features in the cache, as those that follow
took = time.perf_counter() - start
for n in range(1, 40):
    for sign in (1, -1):
        code = child(lambda: killed_at_write(f'write{n * sign}', n * sign))
        assert code in (0, -signal.SIGKILL), (n, code)
        if code:
            assert child(lambda: train(f'write{n * sign}')) == 0, n * sign
    if not code:
        break
assert n > 10
rng, killed = random.Random(0), 0
for i in range(int(sys.argv[2])):
    for _ in range(3):  # killed up to three times
        killed += child(lambda: killed_after(f'time{i}', rng.uniform(0, took))) == -signal.SIGKILL
    assert child(lambda: train(f'time{i}')) == 0, i
assert killed > int(sys.argv[2]) // 3
print('kills:', killed)
"""
SAME = ('metrics.csv', 'best_model.safetensors', 'epochs.safetensors', 'test_scenes.csv', 'test_masks.safetensors')
SAME = [*SAME, 'features.json', 'last_state.safetensors']


def run(code, tmp_path, *args):
    copy_scenes(tmp_path / 'data', train=6, test=2)
    command = [sys.executable, '-c', HELPERS + code, repr(TINY | dict(data_dir='data')), *map(str, args)]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


def test_killed_at_every_write_and_at_random_moments(tmp_path):
    "Never refused, equal to the last digit, no leftovers."
    run(KILLS, tmp_path, 30)
    whole = tmp_path / 'whole/timm_test_vit'
    folders = [p / 'timm_test_vit' for p in tmp_path.glob('[wt]*') if p.name.startswith(('write', 'time'))]
    assert len(folders) > 40
    for folder in folders:
        for part in ('', 'round1/timm_test_vit'):
            for name in SAME:
                a, b = whole / part / name, folder / part / name
                assert not a.exists() or a.read_bytes() == b.read_bytes(), b
        left = [p for p in folder.rglob('.*') if not p.name.startswith('.owner')]
        assert not left, left


DAMAGE = """
import shutil


def damaged(source, target, seed):
    "Change one file of a run: bits, a cut, zeros, bytes of another file, nothing, or a folder in its place."
    shutil.copytree(source, target)
    rng = random.Random(seed)
    files = [p for p in Path(target).rglob('*') if p.is_file() and not p.name.startswith('.') and p.suffix != '.log']
    path = rng.choice(sorted(files))
    kind = rng.choice(['bit', 'header', 'cut', 'zeros', 'other', 'empty', 'gone', 'folder'])
    data = bytearray(path.read_bytes())
    at = rng.randrange(max(1, len(data)))
    if kind in ('bit', 'header') and data:
        data[at if kind == 'bit' else at % 300 % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del data[at:]
    elif kind == 'zeros':
        data[at : at + 64] = bytes(min(64, len(data) - at))
    elif kind == 'other':
        data = bytearray(rng.choice(sorted(files)).read_bytes())
    elif kind == 'empty':
        data = bytearray()
    path.unlink()
    if kind == 'folder':
        path.mkdir()
    elif kind != 'gone':
        path.write_bytes(data)
    return f'{path} {kind}'


def bounded(folder):
    signal.alarm(120)  # no hang, on a busy machine too
    train(folder)


assert child(lambda: train('whole')) == 0
for i in range(int(sys.argv[2])):
    what = damaged('whole', f'damaged{i}', i)
    code = child(lambda: bounded(f'damaged{i}'))
    print(i, what, code, flush=True)
    assert code in (0, 2), (what, code)
"""


def test_damaged_runs_end_right_or_in_one_sentence(tmp_path):
    "Fixed seeds. A run that is not refused has the digits of the whole one in all that its numbers come from."
    said = run(DAMAGE, tmp_path, 40)
    lines = said.splitlines()
    refused = [line for line in lines if line.startswith('refused: ')]
    assert 5 < len(refused) < 40
    whole = tmp_path / 'whole/timm_test_vit'
    ended = [line.split()[0] for line in lines if line[0].isdigit() and line.endswith(' 0')]
    for i in ended:
        for name in ('metrics.csv', 'best_model.safetensors', 'test_scenes.csv', 'test_masks.safetensors'):
            got = (tmp_path / f'damaged{i}/timm_test_vit' / name).read_bytes()
            assert got == (whole / name).read_bytes(), [line for line in lines if line.startswith(f'{i} ')]
