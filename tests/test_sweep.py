"The sweep skips finished runs, continues after a failure and records what was not measured; the report shows its runs."

import json
import re
import subprocess
import sys
from dataclasses import replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
import nbformat
import pandas as pd
import pytest
from conftest import DATA, ROOT, copy_scenes
from papermill.clientwrap import PapermillNotebookClient
from slotnb.core import write_json
from slotnb.report import build_report, load_runs
from slotnb.runs.config import TrainConfig
from slotnb.runs.jobs import LocalExecutor
from slotnb.runs.notebooks import _CHILD, EXECUTION, start_run
from slotnb.sweep import SweepConfig, plan_runs, run_all, sweep

SMALL = dict(layer='-1', resolution='spec', grid_size='spec', data_dir=str(DATA), slot_dim=32, hidden_dim=32)
NOTEBOOK = str(ROOT / 'reports/backbone_run.ipynb')


def assert_tables_agree(notebook: Path, folder: Path):
    "The files results*.csv hold the text of the tables that the notebook shows, and runs.csv the same numbers."
    outputs = [o for c in json.loads(notebook.read_text())['cells'] for o in c.get('outputs', [])]
    pages = [''.join(o['data']['text/html']) for o in outputs if 'text/html' in o.get('data', {})]
    shown = [[unescape(x) for x in re.findall(r'<td>(.*?)</td>', page, re.S)] for page in pages]
    files = sorted(folder.glob('results*.csv'))
    assert {'results', 'results_objects', 'results_engines'} <= {p.stem for p in files}
    for p in files:
        table = pd.read_csv(p, dtype=str, keep_default_na=False)
        num_keys = dict(results_engines=3).get(p.stem, 2)
        cells = table.iloc[:, num_keys:].to_numpy().ravel().tolist()
        assert cells in shown, f'{p.name} is not shown by {notebook.name}; make report writes both'
    runs = pd.read_csv(folder / 'runs.csv')
    results = pd.read_csv(folder / 'results.csv', dtype=str).set_index(['label', 'normalizer'])
    for key, g in runs.groupby(['label', 'normalizer']):
        assert results.loc[key, 'mBO'].split(' ± ')[0] == f'{100 * g.mbo_attn.mean():.1f}'
    assert {'floors.csv', 'curves.csv', 'features.csv'} <= {p.name for p in folder.iterdir()}


def test_committed_report_and_its_tables_agree():
    assert_tables_agree(ROOT / 'reports/ta_report.ipynb', ROOT / 'reports/ta_report')


@pytest.mark.long
def test_sweep_and_report_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_CACHE', str(tmp_path))
    runs_dir, data_dir = tmp_path / 'runs', copy_scenes(tmp_path / 'data', train=12, test=6)
    settings = tuple(f'{k}={v}' for k, v in (SMALL | dict(data_dir=data_dir, warmup_epochs=1)).items())
    config = SweepConfig(
        str(runs_dir), ('dinov2_vits14', 'clip_vitb16'), ('none', 'instance'), (0,), (0.47,), 2, settings, NOTEBOOK
    )
    assert sweep(config, False) == {}
    runs = load_runs(runs_dir)
    assert set(zip(runs.label, runs.normalizer)) == {
        ('dinov2_vits14', 'none'),
        ('dinov2_vits14', 'instance'),
        ('dinov2_vits14 x to std 0.47', 'none'),
    }
    assert 'no weights' in json.loads((runs_dir / 'sweep.json').read_text())['missing']['clip_vitb16']
    assert {
        '12 fixed blocks',
        'ground truth on the grid',
        'k-means on dinov2_vits14',
        'spectral clustering on dinov2_vits14',
        'k-means on RANDOM WEIGHTS dino_vits16',
    } == set(pd.read_csv(runs_dir / 'floors.csv').method)

    written = {p: p.stat().st_mtime_ns for p in runs_dir.rglob('result.json')}
    assert (
        sweep(config, False) == {} and {p: p.stat().st_mtime_ns for p in written} == written
    )  # finished runs are skipped

    page = build_report(runs_dir, tmp_path / 'out/report.html', ROOT / 'reports/ta_report.ipynb').read_text()
    assert page.count('data:image/png') >= 6 and 'Traceback' not in page
    assert 'not measured' in page and 'clip_vitb16' in page
    assert_tables_agree(tmp_path / 'out/report.ipynb', tmp_path / 'out/report')
    assert set(pd.read_csv(tmp_path / 'out/report/results_engines.csv').engine) == {'torch, fp32'}


@pytest.mark.long
def test_continues_after_a_failed_run(tmp_path, few_scenes):
    settings = SMALL | dict(data_dir=str(few_scenes), batch_size=4, warmup_epochs=1, num_epochs=1)
    good, bad = plan_runs(['dinov2_vits14'], ['none', 'instance'], [0], [], str(tmp_path / 'runs'), **settings)
    bad = replace(bad, data_dir='nowhere')
    with LocalExecutor(1) as executor:
        failed = run_all([bad, good], executor, NOTEBOOK, show_progress=False)
    assert list(failed) == [str(bad.run_dir)] and "'nowhere' does not exist" in failed[str(bad.run_dir)]
    assert (good.run_dir / 'result.json').exists() and (good.run_dir / 'run.ipynb').exists()
    assert json.loads((bad.run_dir / 'failed.json').read_text())['exit_code'] != 0


@pytest.mark.parametrize('works, code', [('time.sleep(60)', 1), ('print()', 0)])
def test_a_child_ends_with_its_parent(tmp_path, works, code):
    "The pipe to it ends when the sweep is killed; a child that has done its work ends as usual."
    (tmp_path / 'papermill').mkdir()
    stand_in = f'import time\n\n\ndef execute_notebook(*args, **options):\n    {works}\n'
    (tmp_path / 'papermill/__init__.py').write_text(stand_in)
    command = [sys.executable, '-c', _CHILD, 'in.ipynb', 'out.ipynb', '{}', '{}']
    child = subprocess.Popen(command, stdin=subprocess.PIPE, env=dict(PYTHONPATH=str(tmp_path)))
    if code:
        child.stdin.close()
    assert child.wait(50) == code


def test_papermill_waits_for_the_pictures_of_a_cell():
    "With papermill's own four seconds a sweep on a busy machine fails at a figure, after the training."
    notebook = SimpleNamespace(nb=nbformat.v4.new_notebook())
    options = {k: v for k, v in EXECUTION.items() if k != 'progress_bar'}  # which is not of the client
    assert PapermillNotebookClient(notebook, **options).iopub_timeout == 600


def test_a_started_run_keeps_its_threads(tmp_path, monkeypatch):
    "The sweep that is started again gives each run more threads, as fewer are left."
    config, seen = TrainConfig(save_dir=str(tmp_path)), []
    monkeypatch.setattr(subprocess, 'Popen', lambda *a, env, **kw: seen.append(env['OMP_NUM_THREADS']))
    start_run(config, NOTEBOOK, threads=3)
    write_json(config.round_configs[0].run_dir / 'config.json', dict(config={}, backbone={}, threads=2))
    start_run(config, NOTEBOOK, threads=3)
    assert seen == ['3', '2']


def test_papermill_passes_the_settings(tmp_path, few_scenes):
    "papermill ignores unknown parameters, so a run could train with the defaults: config.json has the passed values."
    (c,) = plan_runs(
        ['dinov2_vits14'],
        ['token'],
        [7],
        [],
        str(tmp_path / 'runs'),
        **SMALL | dict(data_dir=str(few_scenes), batch_size=4),
        num_epochs=1,
        lr=0.5,
        warmup_epochs=0,
    )
    with LocalExecutor(1) as executor:
        assert run_all([c], executor, NOTEBOOK, show_progress=False) == {}
    book = json.loads((c.run_dir / 'config.json').read_text())['config']
    assert book['lr'] == 0.5 and book['seed'] == 7 and book['normalizer'] == 'token'
