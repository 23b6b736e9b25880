"Logs of TensorBoard and W&B are copies of metrics.csv: once each epoch, whatever was interrupted, one for each round."

import signal
import pandas as pd
import pytest
from dataclasses import replace
from slotnb.core import read_json
from slotnb.runs.config import TrainConfig
from slotnb.train import fit
from test_train import SMALL, run

pytest.importorskip('tensorboard')
EPOCHS = dict(num_epochs=4, warmup_epochs=1)


def curve(folder, tag):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / 'tensorboard')).Reload()
    return {e.step: e.value for e in events.Scalars(tag)}, len(events.Scalars(tag))


def wandb_records(path):
    "Records of an offline run. The file is a log of LevelDB: chunks in blocks of 32 KiB, each with a header."
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, text, found = path.read_bytes(), 7, b'', []  # 7: the header of the file
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7:  # the rest of a block
            at += -at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], 'little'), data[at + 6]
        text += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(text))
            text = b''
    return found


def test_a_resumed_run_logs_each_epoch_once(tmp_path, few_scenes):
    settings = (
        SMALL | EPOCHS | dict(data_dir=str(few_scenes), save_dir=str(tmp_path / 'run'), normalizer='lda', rounds=2)
    )
    assert run(settings | dict(logger='tensorboard'), kill_at=2) == -signal.SIGKILL
    config = TrainConfig(**settings, logger='')
    first = config.round_configs[0].run_dir
    assert curve(first, 'train/loss')[1] >= 2
    fit(replace(config, logger='tensorboard'), False)  # the same run
    for folder in (first, config.run_dir):
        table = pd.read_csv(folder / 'metrics.csv')
        for tag, column in {'train/loss': 'loss', 'val/fvu': 'val_fvu', 'train/lr': 'lr'}.items():
            values, n = curve(folder, tag)
            assert n == len(table) == config.num_epochs
            assert [values[e] for e in table.epoch] == pytest.approx(table[column].tolist(), rel=1e-6)
    assert read_json(config.run_dir / 'config.json')['config']['logger'] == ''
    before = {p: p.stat().st_mtime_ns for p in (first / 'tensorboard').iterdir()}
    fit(config, False)  # finished: nothing is written
    assert before == {p: p.stat().st_mtime_ns for p in (first / 'tensorboard').iterdir()}


def test_wandb_is_offline_and_begins_anew(tmp_path, few_scenes, monkeypatch):
    pytest.importorskip('wandb')
    monkeypatch.delenv('WANDB_MODE', raising=False)
    settings = SMALL | EPOCHS | dict(data_dir=str(few_scenes), save_dir=str(tmp_path / 'run'))
    assert run(settings | dict(logger='wandb'), kill_at=2) == -signal.SIGKILL
    config = TrainConfig(**settings, logger='wandb, tensorboard')
    fit(config, False)
    (folder,) = (config.run_dir / 'wandb').glob('offline-run-*')
    records = wandb_records(next(folder.glob('*.wandb')))
    history = [r.history for r in records if r.WhichOneof('record_type') == 'history']
    assert [h.step.num for h in history] == [*range(config.num_epochs)]
    names = {i.key or '/'.join(i.nested_key) for i in history[0].item}
    assert {'train/loss', 'val/fvu'} <= names
    assert curve(config.run_dir, 'val/mse')[1] == config.num_epochs
