"A run's own files, damaged or changed: named and refused in one sentence, or mended to the last digit."

import re
import shutil
from dataclasses import replace
from pathlib import Path
import numpy as np
import pytest
import torch
from conftest import finished_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from slotnb.core import SlotnbError, read_json, write_json
from slotnb.evaluate import evaluate, load_run
from slotnb.explorer.replay import Replay
from slotnb.report import load_curves, load_features, load_runs
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.state import read_metrics
from slotnb.runs.verify import verified, write_sealed
from slotnb.study import curves
from slotnb.sweep import run_status
from slotnb.train import fit

TINY = dict(backbone='timm:test_vit', weights='random', resolution='64', normalizer='instance', rounds=1, device='cpu')
TINY |= dict(num_slots=3, slot_dim=8, hidden_dim=8, num_epochs=3, warmup_epochs=1, batch_size=4)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Configuration of a run that is trained and scored."
    return finished_run(tmp_path_factory.mktemp('finished'), 'run', TINY)


@pytest.fixture
def config(finished, tmp_path):
    "A copy of that run, to be damaged."
    shutil.copytree(finished.save_dir, tmp_path / 'run')
    return replace(finished, save_dir=str(tmp_path / 'run'))


def refused(f, *words):
    with pytest.raises(SlotnbError) as e:
        f()
    said = str(e.value)
    assert '\n' not in said and all(w in said for w in words), said


def rewrite(path, tensors=dict, **meta):
    "Change tensors or header and leave the rest, the checksum included."
    with safe_open(path, 'pt') as f:
        there, header = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()
    save_file(tensors(there), path, header | meta)


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


def without_moments(tensors):
    return {k: v for k, v in tensors.items() if not k.startswith('opt.')}


def short_moments(tensors):
    return {k: v.reshape(-1)[:1].clone() if 'exp_avg' in k else v for k, v in tensors.items()}


STATES = dict(
    bit=one_bit,
    cut=lambda p: p.write_bytes(p.read_bytes()[:-100]),
    empty=lambda p: p.write_bytes(b''),
    moments=lambda p: rewrite(p, without_moments),
    shape=lambda p: rewrite(p, short_moments),
    next_epoch=lambda p: rewrite(p, epoch='4'),
    million=lambda p: rewrite(p, epoch='1000000'),
    nan=lambda p: rewrite(p, best='nan'),
    header=lambda p: save_file(load_file(p), p),
)


@pytest.mark.parametrize('damage', STATES)
def test_a_damaged_state_is_refused(config, damage):
    path = config.run_dir / 'last_state.safetensors'
    STATES[damage](path)
    refused(lambda: fit(config, False), 'last_state.safetensors')


OLD = dict(epoch=4, million=10**6, negative=-1, moments=without_moments, shape=short_moments, nan=float('nan'))


@pytest.mark.parametrize('wrong', OLD)
def test_a_state_without_checksum_must_be_possible(config, wrong):
    "An older version wrote none: what no run can have is refused all the same."
    path, value = config.run_dir / 'last_state.safetensors', OLD[wrong]
    tensors, meta = load_tensors(path)
    header = {k: v for k, v in meta.items() if k != 'run'}
    if wrong == 'nan':
        header['best'] = 'nan'
    elif isinstance(value, int):
        header['epoch'] = str(value)
    save_file(value(tensors) if callable(value) else tensors, path, header)
    refused(lambda: fit(config, False), 'last_state.safetensors')


def test_an_older_run_is_resumed(config, finished):
    "No checksums, no rows in the state, no threads in config.json: not touched, and the table is the same."
    for name in ('last_state', 'best_model', 'epochs'):
        path = config.run_dir / f'{name}.safetensors'
        tensors, meta = load_tensors(path)
        save_file(
            {k: v for k, v in tensors.items() if k != 'rows'}, path, {k: v for k, v in meta.items() if k != 'run'}
        )
    about = read_json(config.run_dir / 'config.json')
    write_json(
        config.run_dir / 'config.json', {k: v for k, v in about.items() if k not in ('threads', 'data', 'digest')}
    )
    fit(config, False)
    assert evaluate(config.run_dir, False)['ari_attn'] == read_json(finished.run_dir / 'result.json')['ari_attn']
    (config.run_dir / 'metrics.csv').write_text('epoch,loss\r\n0,1.0\r\n')
    refused(lambda: fit(config, False), 'metrics.csv', 'first 3 epochs')


TABLES = dict(
    cut=lambda t: t[:-20],
    last_row=lambda t: b''.join(t.splitlines(True)[:-1]),
    first_row=lambda t: b''.join(t.splitlines(True)[:1] + t.splitlines(True)[2:]),
    number=lambda t: t.replace(b'0.', b'1.', 3),
    empty=lambda t: b'',
    noise=lambda t: bytes(range(256)),
)


@pytest.mark.parametrize('damage', TABLES)
def test_a_changed_table_is_named_and_mended(config, damage, capsys):
    path = config.run_dir / 'metrics.csv'
    before = path.read_bytes()
    path.write_bytes(TABLES[damage](before))
    refused(lambda: evaluate(config.run_dir, False), 'metrics.csv was changed or is cut off')
    fit(config, False)
    assert path.read_bytes() == before and 'metrics.csv was changed' in capsys.readouterr().out
    assert len(read_metrics(config.run_dir)) == 3


def test_the_best_checkpoint_is_that_of_the_run(config, finished):
    path = config.run_dir / 'best_model.safetensors'
    good, (tensors, meta) = path.read_bytes(), load_tensors(path)
    one_bit(path)
    for f in (lambda: fit(config, False), lambda: load_run(config.run_dir)):
        refused(f, 'best_model.safetensors', 'checksum')
    save_tensors(path, tensors, epoch=int(meta['epoch']), val_mse=float(meta['val_mse']), run='another')
    for f in (lambda: fit(config, False), lambda: load_run(config.run_dir)):
        refused(f, 'best_model.safetensors')
    save_tensors(path, tensors, epoch=0, val_mse=123.0, run=eval(meta['run']))
    refused(lambda: fit(config, False), 'best_model.safetensors')
    path.unlink()
    refused(lambda: fit(config, False), 'best_model.safetensors is missing')
    path.write_bytes(good)
    fit(config, False)
    assert path.read_bytes() == good


@pytest.mark.parametrize('content', [None, [], 'text', 5, {}, dict(config=[]), dict(config={}, backbone=None)])
def test_a_config_that_is_none(config, content):
    path = config.run_dir / 'config.json'
    write_json(path, content)
    for f in (lambda: fit(config, False), lambda: load_run(config.run_dir)):
        refused(f, 'config.json', "is not a run's configuration")


def test_a_changed_config_is_refused(config):
    path = config.run_dir / 'config.json'
    about = read_json(path)
    for change in (dict(threads=7), dict(trained_with=['abacus']), dict(versions={})):
        write_json(path, about | change)
        refused(lambda: load_run(config.run_dir), 'config.json was changed')
    older = {k: v for k, v in about.items() if k != 'digest'}
    for digests in (about, older):  # without a digest it is the checkpoint's key that does not fit
        for change in (dict(seed=5), dict(attn_temperature=2.0)):
            write_json(path, digests | dict(config=about['config'] | change))
            refused(lambda: load_run(config.run_dir), 'config.json')
    write_json(path, about | dict(backbone=about['backbone'] | dict(resolution=[32, 32])))
    refused(lambda: load_run(config.run_dir), 'config.json')
    write_json(path, about | dict(config=about['config'] | dict(data_dir='moved', device='cuda')))
    assert load_run(config.run_dir).epoch >= 0


def test_files_that_are_for_reading_only(config):
    "Masks for the explorer and times per epoch: a damaged one is no reason to refuse a run."
    one_bit(config.run_dir / 'epochs.safetensors')
    (config.run_dir / 'timing.csv').write_bytes(bytes(range(256)))
    fit(config, False)
    assert 'epochs.safetensors is damaged' in (config.run_dir / 'train.log').read_text()
    assert np.isnan(evaluate(config.run_dir, False)['seconds_per_epoch'])


@pytest.fixture(scope='module')
def another(finished, tmp_path_factory):
    "The same run with another seed: its files are as sound as those of `finished`."
    config = replace(finished, seed=1, save_dir=str(tmp_path_factory.mktemp('another')))
    fit(config, False)
    evaluate(config.run_dir, False)
    return config


RESULTS = ('result.json', 'test_scenes.csv', 'features.json', 'test_masks.safetensors')
CHANGES = dict(
    digit=lambda data: re.sub(rb'(\d)(\D*)$', lambda m: b'%d' % ((int(m[1]) + 1) % 10) + m[2], data),
    bit=lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    cut=lambda data: data[:-30],
    empty=lambda data: b'',
)


@pytest.mark.parametrize('name', RESULTS)
@pytest.mark.parametrize('change', [*CHANGES, 'exchanged', 'missing'])
def test_changed_results_are_refused_and_made_again(config, another, change, name, tmp_path, capsys):
    "What reads them names the file; the sweep does not take the run for finished; evaluation makes them again."
    path = config.run_dir / name
    before = path.read_bytes()
    if change == 'missing':
        path.unlink()
    else:
        data = (another.run_dir / name).read_bytes() if change == 'exchanged' else CHANGES[change](before)
        assert data != before or name == 'features.json'
        path.write_bytes(data)
    if name == 'features.json' and change == 'exchanged':  # the features of both seeds are the same
        return
    if (change, name) == ('exchanged', 'result.json'):
        name = 'test_scenes.csv'  # the first one that the other record does not fit
    if (change, name) == ('missing', 'result.json'):
        assert run_status(config) == 'started'
    else:
        refused(lambda: report_of(config), name, 'makes it again')
        assert run_status(config) == 'started' and name in capsys.readouterr().out
    evaluate(config.run_dir, False)
    assert path.read_bytes() == before and run_status(config) == 'finished'
    report_of(config)


def report_of(config):
    "Read all that a report reads of a run."
    runs = load_runs(Path(config.save_dir).parent)
    load_features(runs)
    load_curves(runs)
    (row,) = runs.itertuples()
    for name in ('test_scenes.csv', 'test_masks.safetensors'):
        verified(Path(row.run_dir) / name)


@pytest.mark.parametrize('damage', TABLES)
def test_a_changed_table_is_shown_by_nobody(config, damage):
    path = config.run_dir / 'metrics.csv'
    path.write_bytes(TABLES[damage](path.read_bytes()))
    for f in (lambda: report_of(config), lambda: Replay(config.run_dir), lambda: curves(dict(a=[config]), ('loss',))):
        write_sealed(config.run_dir / 'study.json', {})
        refused(f, 'metrics.csv was changed or is cut off')


def test_masks_of_another_run_are_not_replayed(config, another):
    shutil.copy(another.run_dir / 'epochs.safetensors', config.run_dir)
    refused(lambda: Replay(config.run_dir), 'epochs.safetensors is of another run')


def test_masks_belong_to_a_run(config, tmp_path):
    shutil.copytree(config.data_dir, tmp_path / 'data')
    moved = replace(config, data_dir=str(tmp_path / 'data'))
    fit(moved, False)  # the same content in another place
    for split in ('test', 'train'):
        path = next((tmp_path / 'data' / split).rglob('segmentation_*.png'))
        good, seg = path.read_bytes(), np.array(Image.open(path))
        seg[:9, :9] = 0 if seg[:9, :9].any() else 1
        Image.fromarray(seg).save(path)
        refused(lambda: fit(moved, False), f"other masks: those of the split '{split}' have changed")
        path.write_bytes(good)
    fit(moved, False)


def test_equal_runs_have_equal_files(config, finished, tmp_path):
    again = replace(config, save_dir=str(tmp_path / 'again'))
    fit(again, False)
    for name in ('best_model.safetensors', 'last_state.safetensors', 'epochs.safetensors', 'metrics.csv'):
        assert (again.run_dir / name).read_bytes() == (finished.run_dir / name).read_bytes(), name


def test_resumed_with_the_number_of_threads_that_it_began_with(config):
    begun, seen = read_json(config.run_dir / 'config.json')['threads'], []
    assert begun == torch.get_num_threads()
    try:
        torch.set_num_threads(begun + 1)
        fit(config, False)
        assert torch.get_num_threads() == begun + 1
        from slotnb.runs.identity import same_threads

        with same_threads(config.run_dir):
            seen.append(torch.get_num_threads())
    finally:
        torch.set_num_threads(begun)
    assert seen == [begun]
