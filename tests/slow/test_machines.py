"Folders that may only be read, an account without a home, full disks: the result, or one sentence."

import os
import shutil
import subprocess
import sys
from pathlib import Path
import pytest
from conftest import copy_scenes, finished_run
from slotnb.core import SlotnbError
from slotnb.runs.config import TrainConfig
from slotnb.train import fit

TINY = dict(backbone='timm:test_vit', weights='random', resolution='64', normalizer='lda', rounds=2, device='cpu')
TINY |= dict(num_slots=3, slot_dim=8, hidden_dim=8, space_dim=4, num_epochs=3, warmup_epochs=1, batch_size=4)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "A sweep's folder with one run that is trained and scored."
    return finished_run(tmp_path_factory.mktemp('finished'), 'runs/lda-seed0', TINY)


def as_anybody(code, *args, cwd, **env):
    "Run Python as a user to whom permissions apply; root gives up the right to write everywhere."
    command = [sys.executable, '-c', code, *map(str, args)]
    if os.geteuid() == 0:
        if not shutil.which('setpriv'):
            pytest.skip('root may write everywhere, and setpriv is not installed')
        command = ['setpriv', '--bounding-set=-dac_override,-dac_read_search', *command]
    given = {k: v for k, v in (os.environ | env).items() if v is not None}
    return subprocess.run(command, cwd=cwd, env=given, capture_output=True, text=True)


READ = """
import os, sys
from pathlib import Path
import numpy as np
from slotnb.commands.runs import TrainCommand, _train
from slotnb.core import read_json
from slotnb.evaluate import evaluate, load_run
from slotnb.explorer.replay import Replay, training_page
from slotnb.explorer.state import State
from slotnb.explorer.viewer import Viewer
from slotnb.report import load_curves, load_features, load_runs
from slotnb.runs.config import TrainConfig

settings = eval(sys.argv[1])
config = TrainConfig(**settings)
assert not os.access(config.run_dir, os.W_OK)
before = {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}
result = evaluate(config.run_dir, False)
assert result['mbo_merged'] == read_json(config.run_dir / 'result.json')['mbo_merged']
_train(TrainCommand(**settings))
assert load_run(config.run_dir).segment(np.zeros((64, 64, 3), np.uint8)).labels.shape == (64, 64)
runs = load_runs('runs')
assert len(load_curves(runs)) == config.num_epochs and len(load_features(runs)) == 2
assert Viewer(config.run_dir, show_progress=False).output(State(source='refined')).labels.shape == (256, 256)
assert training_page(Replay(config.run_dir), State(view='training')).pictures
assert before == {p: p.read_bytes() for p in Path('.').rglob('*') if p.is_file()}
"""


def test_a_finished_run_on_a_read_only_disk(finished, tmp_path):
    "Evaluated, trained again, segmented with, reported and explored; not a byte is written."
    folder = Path(finished.save_dir).parent.parent
    settings = TINY | dict(data_dir=finished.data_dir, save_dir=finished.save_dir)
    everything = [folder, *folder.rglob('*')]
    try:
        for path in everything:
            path.chmod(0o555 if path.is_dir() else 0o444)
        done = as_anybody(READ, settings, cwd=folder, SLOTNB_CACHE=str(tmp_path / 'cache'))
        assert done.returncode == 0, done.stdout + done.stderr
        assert 'the scores are returned and not kept' in done.stdout + done.stderr
        assert 'best epoch' in done.stdout
    finally:
        for path in everything:
            path.chmod(0o755 if path.is_dir() else 0o644)


COMMAND = 'import sys; from slotnb.cli import main; sys.exit(main(sys.argv[1:]))'


def train(folder):
    return ['train', *(f'--{k}={v}' for k, v in TINY.items()), '--data_dir', 'data', '--save_dir', folder]


@pytest.mark.parametrize('home', [None, 'nowhere', 'locked'])
def test_without_a_home(finished, home, tmp_path):
    "It works, or one sentence says what to set."
    copy_scenes(tmp_path / 'data', train=6, test=2)
    (tmp_path / 'locked').mkdir(mode=0o555)
    where = None if home is None else str(tmp_path / 'locked' / home)
    done = as_anybody(COMMAND, *train('run'), cwd=tmp_path, SLOTNB_CACHE=None, XDG_CACHE_HOME=None, HOME=where)
    said = [line for line in done.stderr.splitlines() if line.startswith('slotnb: ')]
    assert 'Traceback' not in done.stderr, done.stderr
    assert done.returncode == 0 or (done.returncode == 2 and len(said) == 1), done.stderr
    if home:
        assert done.returncode == 2 and 'SLOTNB_CACHE' in said[0], said
        assert not (tmp_path / 'run').exists()
        (tmp_path / 'cache').mkdir()
        done = as_anybody(COMMAND, *train('run'), cwd=tmp_path, SLOTNB_CACHE='cache', HOME=where)
        assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
@pytest.mark.parametrize('name', ['train.log', 'timing.csv'])
def test_a_full_disk(finished, name, tmp_path):
    "Named, and the same command goes on to the same digits when there is space."
    config = TrainConfig(**TINY, data_dir=finished.data_dir, save_dir=str(tmp_path / 'run'))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / name).symlink_to('/dev/full')
    with pytest.raises(SlotnbError, match=f'cannot write .*{name}: No space left on device') as e:
        fit(config, False)
    assert '\n' not in str(e.value)
    (config.run_dir / name).unlink()
    fit(config, False)
    for same in ('metrics.csv', 'best_model.safetensors', 'last_state.safetensors'):
        assert (config.run_dir / same).read_bytes() == (finished.run_dir / same).read_bytes()


def test_render_without_a_main_guard(tmp_path):
    "One sentence that says what to do; with the guard it renders."
    pytest.importorskip('mujoco')
    pytest.importorskip('mitsuba')
    call = "render('out', scenes=2, size=16, samples=4, workers=2, progress=False)"
    script = tmp_path / 'script.py'
    script.write_text(f'from slotnb.scenes.render import render\n{call}\n')
    done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count('Traceback') == 1, done.stderr
    assert "put the call below `if __name__ == '__main__':`, or use workers=1" in done.stderr
    assert not list((tmp_path / 'out').rglob('scene_*'))
    script.write_text(f"from slotnb.scenes.render import render\nif __name__ == '__main__':\n    {call}\n")
    subprocess.run([sys.executable, script], cwd=tmp_path, check=True)
    assert len(list((tmp_path / 'out/train').iterdir())) == 2
