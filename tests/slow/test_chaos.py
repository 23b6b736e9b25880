"""Kills and damaged files: whatever happens to a run, the same command ends in the same digits, or in one sentence.

The processes are forked from one that has only imported slotnb, so that hundreds of them cost little."""

import os
import subprocess
import sys
from dataclasses import fields
import nbformat
import pytest
from conftest import copy_scenes
from slotnb.runs.config import TrainConfig

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
    run(KILLS, tmp_path, 12)
    whole = tmp_path / 'whole/timm_test_vit'
    folders = [p / 'timm_test_vit' for p in tmp_path.glob('[wt]*') if p.name.startswith(('write', 'time'))]
    assert len(folders) > 40
    for folder in folders:
        for part in ('', 'round1/timm_test_vit'):
            for name in SAME:
                a, b = whole / part / name, folder / part / name
                assert not a.exists() or a.read_bytes() == b.read_bytes(), b
        left = [p for p in folder.rglob('.*') if p.name != '.owner.lock']
        assert not left, left


COMMANDS = """
import shutil
from slotnb.backbones import ViTBackbone
from slotnb.evaluate import load_run
from slotnb.features import extract
from slotnb.formats.convert import convert_data
from slotnb.formats.detect import open_dataset
from slotnb.report import render_notebook
from slotnb.scenes.render import load_mitsuba, render
from slotnb.segment.folder import MaskFiles, write_masks


def features(out):
    net = ViTBackbone('timm:test_vit', 'random', resolution=64, device='cpu')
    extract(net, open_dataset('data', 'train', 0), 2, out, False, 0, shard_size=2)


def segment(out):
    run = load_run('trained/timm_test_vit')
    files = MaskFiles(soft=True, coco='rle')
    write_masks(run.segmenter(), open_dataset('data', 'train', 0), out, dict(run='tiny'), files, 2, False)


def webdataset(out):
    convert_data('data', out, 'webdataset', shard_size=2, progress=False)


def kubric(out):
    convert_data('data', out, 'kubric', progress=False)


def rendering(out):
    render(out, scenes=4, size=16, samples=4, progress=False)


def report(out):
    render_notebook('tables.ipynb', f'{out}/page.html', dict(tables=os.path.abspath(f'{out}/page')))


def interrupted(work, out, how, after):
    "Kill the process, or interrupt it as Ctrl-C does, after some seconds or at the n-th file that gets its name."
    if isinstance(after, int):
        before, count = os.replace, [0]

        def replace(a, b):
            count[0] += 1
            if count[0] == after:
                os.kill(os.getpid(), how)
            before(a, b)

        os.replace = replace
    else:
        signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), how))
        signal.setitimer(signal.ITIMER_REAL, after)
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(1) or signal.default_int_handler(*_))
    try:
        work(out)
    except BaseException:  # libraries turn an interrupt into errors of their own, see `slotnb.cli.main`
        if pressed:
            os._exit(130)
        raise


def contents(folder):
    "Files of a folder, without the lock, the executed notebook and its page, which hold times."
    skip = lambda p: p.name == '.owner.lock' or p.suffix in ('.ipynb', '.html')
    return {str(p.relative_to(folder)): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file() and not skip(p)}


assert child(lambda: train('trained')) == 0
open_dataset('data', 'train', 0)
rng, stopped = random.Random(1), 0
for work, times in ((features, 10), (segment, 8), (webdataset, 8), (kubric, 8), (rendering, 6), (report, 2)):
    name = work.__name__
    if work in (webdataset, kubric):  # imports what they import late; threads of torch would not outlive a fork
        work(f'{name}-parent')
    assert child(lambda: work(f'{name}-whole')) == 0, name
    start = time.perf_counter()
    assert child(lambda: work(f'{name}-again')) == 0
    took, whole = time.perf_counter() - start, contents(f'{name}-whole')
    assert whole and whole == contents(f'{name}-again'), name
    for i in range(times):
        out, how = f'{name}-{i}', rng.choice([signal.SIGKILL, signal.SIGINT])
        after = rng.choice([rng.randint(1, 8), rng.uniform(0, took)]) if name != 'report' else rng.uniform(0, took)
        code = child(lambda: interrupted(work, out, how, after))
        assert code in (0, 130, -signal.SIGKILL), (out, how, after, code)
        stopped += code != 0
        assert child(lambda: work(out)) == 0, (out, how, after)
        found = contents(out)
        assert sorted(found) == sorted(whole), (out, how, after, set(found) ^ set(whole))
        assert found == whole, (out, how, after, [k for k in whole if found[k] != whole[k]])
        shutil.rmtree(out)
    print(name, 'stopped so far:', stopped, flush=True)
"""
TABLES = """
from pathlib import Path
import pandas as pd
from slotnb.runs.verify import write_table
for i in range(5):
    write_table(Path(tables) / f'{i}.csv', pd.DataFrame(dict(a=range(5))))
"""


def write_notebook(path, parameters, code):
    "A notebook with a cell of parameters and a cell of code."
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (parameters, code)])
    nb.cells[0].metadata.tags = ['parameters']
    nb.metadata.kernelspec = dict(name='python3', display_name='python3', language='python')
    nbformat.write(nb, path)


def test_other_commands_killed_and_interrupted(tmp_path):
    "The same command again: equal to the last byte, nothing lost, no leftovers."
    pytest.importorskip('mujoco')
    pytest.importorskip('mitsuba')
    write_notebook(tmp_path / 'tables.ipynb', "tables: str = 'tables'", TABLES)
    said = run(COMMANDS, tmp_path)
    assert int(said.split()[-1]) > 25, said


SWEEP = """
import papermill  # before a package of that name stands in for it
from slotnb.core import digest
from slotnb.runs.jobs import LocalExecutor
from slotnb.sweep import plan_runs, run_all

os.environ['PYTHONPATH'] = os.path.abspath('stand_in')
shared = {k: v for k, v in settings.items() if k not in ('backbone', 'normalizer')}


def sweep(out):
    plan = plan_runs(['timm:test_vit'], ['lda', 'instance'], [0], [], out, **shared)
    with LocalExecutor(2) as executor:
        assert run_all(plan, executor, 'run.ipynb', False) == {}


def processes(folder):
    "Numbers of the processes that own a run of the sweep."
    found = [p.read_text() for p in Path(folder).glob('*/*/.owner') if p.is_file()]
    return [int(n) for n in found if n]


def started(folder, number):
    "Start the sweep, and wait until so many of its runs have begun and a moment of the generator's."
    pid = os.fork()
    if not pid:
        try:
            sweep(folder)
        finally:
            os._exit(0)
    while len(processes(folder)) < number and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.5))
    return pid


rng = random.Random(2)
assert child(lambda: sweep('whole')) == 0
for i in range(int(sys.argv[2])):
    pid = started(f'parent{i}', 1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert child(lambda: sweep(f'parent{i}')) == 0, i
    pid = started(f'child{i}', 1)
    for p in processes(f'child{i}')[:1]:
        try:
            os.kill(p, signal.SIGKILL)
        except ProcessLookupError:
            pass  # it has just ended
    os.waitpid(pid, 0)
    assert child(lambda: sweep(f'child{i}')) == 0, i
"""
STAND_IN = """
from slotnb.evaluate import evaluate
from slotnb.runs.config import TrainConfig
from slotnb.train import fit


def execute_notebook(notebook, out, parameters, **options):
    config = TrainConfig(**parameters)
    fit(config, False, 0.0)
    evaluate(config.run_dir, False)
"""


def test_a_sweep_whose_parent_or_child_is_killed(tmp_path):
    "A program without a kernel stands in for papermill."
    (tmp_path / 'stand_in/papermill').mkdir(parents=True)
    (tmp_path / 'stand_in/papermill/__init__.py').write_text(STAND_IN)
    declared = '\n'.join(f'{f.name}: {f.type.__name__} = {f.default!r}' for f in fields(TrainConfig))
    write_notebook(tmp_path / 'run.ipynb', declared, '')
    run(SWEEP, tmp_path, 1)
    for folder in (tmp_path / 'parent0', tmp_path / 'child0'):
        runs = sorted(p.parent for p in folder.glob('*/*/result.json'))
        assert len(runs) == 2
        for path in runs:
            for name in SAME:
                assert (path / name).read_bytes() == (tmp_path / 'whole' / path.relative_to(folder) / name).read_bytes()
        assert {p.name for p in folder.rglob('.*')} <= {'.owner.lock'}


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
