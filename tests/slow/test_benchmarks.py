"""The benchmarks at tiny sizes: they run, and the sides agree; never how long it took. The committed results are
complete."""

import json
import subprocess
import sys
import pytest
from conftest import ROOT
from slotnb.speed import paired_table, plot_speed, scores_table, speed_table, used_table

PARTS = {'steps', 'quality', 'extraction', 'scale'}
RESULTS = sorted((ROOT / 'benchmarks/results').glob('*.json'))


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp('bench') / 'result.json'
    command = [sys.executable, str(ROOT / 'benchmarks/run.py'), '--small', '--out', str(out)]
    subprocess.run(command, check=True, cwd=out.parent)
    return json.loads(out.read_text())


def test_every_part_runs(small):
    assert set(small) == PARTS and all(part['small'] for part in small.values())


def test_a_step_has_the_gradients_of_the_plain_one(small):
    for r in small['steps']['result']['rows']:
        assert r['gradient_gap'] < 1e-5
        assert set(r['step']) == {'plain', *(f'{e}, {p}' for e in ('torch', 'fast') for p in ('fp32', 'bf16'))}
        assert r['used']['torch, fp32'] == 'torch, fp32' and r['used']['fast, fp32'].startswith('fast, fp32')


def test_runs_are_scored(small):
    rows = small['quality']['result']['rows']
    assert len({r['arm'] for r in rows}) * 2 == len(rows) and all(0 <= r['mbo_attn'] <= 1 for r in rows)
    assert {r['engine'].split(',')[0] for r in rows} == {'torch', 'fast'}


def test_faster_features_are_close(small):
    sides = small['extraction']['result']['sides']
    assert sides['fp32']['relative_error'] < 1e-4 and 0 < sides['bf16']['relative_error'] < 0.05


def test_what_runs_on_a_gpu_runs(tmp_path):
    "The part for a GPU, on the CPU: epochs of both engines and a stack."
    out = tmp_path / 'gpu.json'
    command = [sys.executable, str(ROOT / 'benchmarks/run.py'), '--only', 'gpu', '--small', '--out', str(out)]
    subprocess.run(command, check=True, cwd=tmp_path)
    found = json.loads(out.read_text())['gpu']['result']
    assert set(found['seconds_per_epoch']) == {'torch', 'fast'} and found['seconds_of_stack'] > 0


@pytest.mark.parametrize('path', RESULTS, ids=lambda p: p.stem)
def test_committed_results_are_complete(path):
    result = json.loads(path.read_text())
    assert PARTS <= set(result) and not any(part['small'] for part in result.values())
    assert len({json.dumps(part['machine']['processor']) for part in result.values()}) == 1
    for table in (speed_table(result), used_table(result), scores_table(result), paired_table(result)):
        assert not table.isna().any().any()
    assert (scores_table(result).seeds.astype(int) >= 5).all() and len(plot_speed(result).axes) == 2


def test_there_are_results():
    assert RESULTS
