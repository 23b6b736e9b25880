"The benchmarks at tiny sizes: that they run, and that both sides of each agree; never how long it took. The committed numbers: whole, and with a quality for every speed."

import json, subprocess, sys
import pytest
from conftest import ROOT
from slotnb.speed import paired_table, plot_speed, speed_table, throughput_table

PARTS = {'steps', 'quality', 'vectorize', 'extraction', 'scale'}


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp('bench') / 'result.json'
    subprocess.run(
        [sys.executable, str(ROOT / 'benchmarks/run.py'), '--small', '--threads', '2', '--out', str(out)],
        check=True,
        cwd=out.parent,
    )
    return {name: part['result'] for name, part in json.loads(out.read_text()).items()}


def test_every_part_runs(small):
    assert set(small) == PARTS


def test_a_step_has_the_gradients_of_the_plain_one(small):
    for r in small['steps']['rows']:
        assert (
            r['gaps']['fp32']['gradients'] < 1e-5
            and r['gaps']['fp32']['loss'] < 1e-5
            and r['gaps']['bf16']['gradients'] < 0.05
        )
        assert r['flops']['fp32'] <= r['flops']['plain'] and r['flops']['bf16'] == r['flops']['fp32']


def test_training_goes_the_same_way(small):
    "Four steps from the same start: the loss of each seed, plain, by slotnb's step, in a stack."
    rows = {
        (r['model'], r['side'], r['seed']): r
        for r in small['quality']['rows']
        if (r['batch_size'], r['rate']) == (2, 1)
    }
    assert {side for _, side, _ in rows} == {'plain', 'fp32', 'bf16', 'stack'}
    for (model, side, seed), r in rows.items():
        assert r['curve'] == pytest.approx(rows[model, 'plain', seed]['curve'], rel=1e-2 if side == 'bf16' else 1e-5)
        assert 0 <= r['mbo'] <= 1


@pytest.mark.parametrize('fresh', [[], ['--fresh']])
def test_plain_models_are_trained_once(small, fresh, tmp_path):
    "They stay while nothing has changed that their scores depend on, and are trained again when somebody says so; all others are trained."
    out, before = tmp_path / 'result.json', json.loads(json.dumps(small['quality']))
    for r in before['rows']:
        r['mbo'] = 2.0  # so that what stays can be told
    out.write_text(json.dumps(dict(quality=dict(result=before))))
    subprocess.run(
        [sys.executable, str(ROOT / 'benchmarks/run.py'), '--small', '--only', 'quality', '--out', str(out), *fresh],
        check=True,
        cwd=tmp_path,
    )
    after = json.loads(out.read_text())['quality']['result']
    assert [r['mbo'] == 2 for r in after['rows']] == [r['side'] == 'plain' and not fresh for r in after['rows']]
    same = (
        [{k: v for k, v in r.items() if k != 'mbo'} for r in after['rows']],
        [{k: v for k, v in r.items() if k != 'mbo'} for r in before['rows']],
    )
    assert same[0] == same[1]  # one thread does the same every time
    assert after['plain']['key'] == before['plain']['key']


def test_many_runs_are_as_one_after_another(small):
    assert small['vectorize']['largest_relative_difference_of_loss'] < 1e-4


def test_faster_features_are_near(small):
    (b,) = small['extraction']['backbones']
    assert b['sides'][0]['side'] == 'library' and b['gflop_an_image'] > 1
    for s in b['sides']:
        if 'error' in s:
            assert 0 < s['error'] < 0.05


def test_memory_counts_grow_as_they_must(small):
    for r in small['scale']:
        if r['what'] == 'tokens':
            assert sorted(set(r['peak_mb'])) == r['peak_mb'] and 0 < r['exponents']['peak_mb'] < 1.2


def test_what_runs_on_a_gpu_runs(tmp_path):
    "The script for a GPU, on the CPU: steps have the gradients of the plain ones (it asserts them), epochs and stacks are whole. Its quality is that of run.py."
    subprocess.run(
        [
            sys.executable,
            str(ROOT / 'benchmarks/cuda.py'),
            '--small',
            '--device',
            'cpu',
            '--only',
            'steps',
            'epoch',
            'many',
            '--out',
            str(tmp_path / 'cuda.json'),
        ],
        check=True,
    )
    result = json.loads((tmp_path / 'cuda.json').read_text())
    assert set(result) == {'steps', 'epoch', 'many'} and all(part['small'] for part in result.values())


def test_committed_numbers_of_a_gpu_are_whole():
    result = json.loads((ROOT / 'benchmarks/cuda.json').read_text())
    assert set(result) == {'steps', 'epoch', 'many', 'features', 'quality'} and not any(
        part['small'] for part in result.values()
    )
    assert all(part['machine']['gpu'] for part in result.values())
    for r in result['steps']['result']['rows']:
        assert r['gaps']['fp32']['gradients'] < 1e-4 and r['gaps']['bf16']['gradients'] < 0.05
    assert not speed_table(result).isna().any().any() and (paired_table(result).seeds.astype(int) >= 5).all()
    assert result['features']['result']['error'] < 0.01


@pytest.mark.parametrize(
    'name, parts', [('result_amx', {'steps', 'quality'}), ('result_avx512', {'vectorize', 'extraction', 'scale'})]
)
def test_numbers_of_other_processors_are_whole(name, parts):
    result = json.loads((ROOT / f'benchmarks/{name}.json').read_text())
    assert set(result) == parts and not any(part['small'] for part in result.values())
    for part in result.values():
        assert name.split('_')[1] in ' '.join(part['machine']['instructions'])


def test_committed_numbers_are_whole():
    result = json.loads((ROOT / 'benchmarks/result.json').read_text())
    assert set(result) == PARTS and not any(part['small'] for part in result.values())
    for part in result.values():
        assert {'processor', 'threads', 'instructions', 'torch_uses', 'versions', 'date', 'energy'} <= part[
            'machine'
        ].keys()
    throughput, paired = throughput_table(result), paired_table(result)
    assert (
        not speed_table(result).isna().any().any()
        and (throughput.seeds.astype(int) >= 5).all()
        and (paired.seeds.astype(int) >= 5).all()
    )
    assert throughput[['images/s', 'FVU', 'FG-ARI', 'ARI', 'mBO']].map(len).all().all()  # no speed without its quality
    assert len(plot_speed(result).axes) == 3
