"A search resumes with the same number of trials, records failures, and refuses what it cannot go on with."

import json
import sys
import pandas as pd
import pytest
from conftest import DATA, ROOT
from slotnb import label_free
from slotnb import tune as module
from slotnb.core import SlotnbError
from slotnb.search_space import TuneConfig
from slotnb.tune import best_command, tune

pytest.importorskip('optuna')


def config_of(folder, **other):
    other = dict(trials=8, workers=1, layer=('-1',), data_dir=str(DATA), out_dir=str(folder)) | other
    return TuneConfig(notebook=str(ROOT / 'reports/backbone_run.ipynb'), **other)


@pytest.fixture
def runs(monkeypatch):
    "Runs that are not trained: their value is known, those with many slots fail. Returns the trained configurations."
    trained, known = [], {}

    def run_all(plan, *_):
        for c in plan:
            if len(trained) == runs_until[0]:
                raise KeyboardInterrupt
            trained.append(c)
            known[str(c.run_dir)] = -abs(c.lr - 0.002) - 0.1 * (c.normalizer != 'lda') + 0.001 * c.rounds
        return {str(c.run_dir): 'out of memory' for c in plan if c.num_slots > 13}

    runs_until = [10**9]
    monkeypatch.setattr(module, 'run_all', run_all)
    monkeypatch.setattr(module, 'run_value', lambda objective, dirs: sum(known[d] for d in dirs) / len(dirs))
    monkeypatch.setattr(module, 'data_digests', lambda config, _: dict(train=config.layer))
    return trained, runs_until


def test_interrupted_and_resumed_is_as_uninterrupted(tmp_path, runs):
    trained, until = runs
    whole = tune(config_of(tmp_path / 'whole'), False)
    assert len(whole) == 8 and set(whole.state) == {'COMPLETE', 'FAIL'}
    assert (whole.why[whole.state == 'FAIL'] == 'out of memory').all()
    assert whole.lr[0] == 0.002 and whole.normalizer[0] == 'lda'  # the default recipe
    for stop in (3, 2):
        until[0] = len(trained) + stop
        with pytest.raises(KeyboardInterrupt):
            tune(config_of(tmp_path / 'cut'), False)
    until[0] = 10**9
    cut = tune(config_of(tmp_path / 'cut'), False)
    same = ['state', 'value', 'lr', 'normalizer', 'num_slots', 'attn_temperature']
    pd.testing.assert_frame_equal(whole[same], cut[same])
    n = len(trained)
    assert len(tune(config_of(tmp_path / 'cut'), False)) == 8 and len(trained) == n  # finished
    assert len(tune(config_of(tmp_path / 'cut', trials=10), False)) == 10
    table = pd.read_csv(tmp_path / 'cut/trials.csv')
    assert len(table) == 10 and table.value.idxmax() == 0
    assert '--lr=0.002' in best_command(config_of(tmp_path / 'cut'), table, 'dinov2_vits14')


def test_two_backbones_two_seeds_and_halving(tmp_path, runs):
    trained, _ = runs
    config = config_of(
        tmp_path / 'out', backbone=('dinov2_vits14', 'dino_vits16'), seed=(0, 1), pruner='halving', trials=9
    )
    table = tune(config, False)
    assert table.groupby('backbone').size().to_dict() == dict(dinov2_vits14=9, dino_vits16=9)
    assert set(table.runs.str.split().map(len)) == {2}
    pruned = table[table.state == 'PRUNED']
    assert len(pruned) and set(pruned.normalizer) == {'lda'} and pruned.value.isna().all()
    whole = {str(c.run_dir) for c in trained if c.rounds == 3}
    assert not whole & {d for each in pruned.runs for d in each.split()}  # only their first round was trained


def test_what_a_search_refuses(tmp_path, runs, monkeypatch):
    tune(config_of(tmp_path / 'out', trials=1), False)
    with pytest.raises(SlotnbError, match='holds a search with other settings .lr'):
        tune(config_of(tmp_path / 'out', lr=(0.001, 0.01)), False)
    monkeypatch.setattr(module, 'data_digests', lambda config, _: dict(train='other'))
    with pytest.raises(SlotnbError, match='search on other images'):
        tune(config_of(tmp_path / 'out'), False)
    monkeypatch.setattr(module, 'data_digests', lambda config, _: dict(train=config.layer))
    (tmp_path / 'out/optuna.journal.lock').symlink_to('optuna.journal')
    with pytest.raises(SlotnbError, match='optuna.journal is locked by another program'):
        tune(config_of(tmp_path / 'out'), False)
    (tmp_path / 'out/optuna.journal.lock').unlink()
    journal = tmp_path / 'out/optuna.journal'
    journal.write_text('{"op_code": 0\n' + journal.read_text())
    with pytest.raises(SlotnbError, match='optuna.journal cannot be read'):
        tune(config_of(tmp_path / 'out'), False)
    monkeypatch.setitem(sys.modules, 'optuna', None)
    with pytest.raises(SlotnbError, match=r'tune needs optuna.*slotnb\[tune\]'):
        tune(config_of(tmp_path / 'new'), False)
    assert json.loads((tmp_path / 'out/tune.json').read_text())['settings']['lr'] == [0.0005, 0.008]


def test_a_folder_in_use_is_refused(tmp_path, runs):
    from slotnb.runs.owner import Owner

    with Owner(tmp_path / 'out'), pytest.raises(SlotnbError, match='is in use by process'):
        tune(config_of(tmp_path / 'out'), False)


def test_objectives_of_a_trained_run(monkeypatch):
    monkeypatch.setattr(label_free, 'MOST_IMAGES', 4)
    monkeypatch.chdir(ROOT)  # the shipped model names its data relative to the repository
    values = {name: label_free.run_value(name, ['movi_a', 'movi_a']) for name in ('seeds', 'refined', 'mbo')}
    assert values['seeds'] == 1  # a run agrees with itself
    assert 0.6 < values['refined'] < 1 and 0.5 < values['mbo'] < 1
    with pytest.raises(SlotnbError, match='two seeds or more'):
        label_free.run_value('seeds', ['movi_a'])
