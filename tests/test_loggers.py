"A logger that cannot be had is refused before anything is computed. Real logs: tests/slow/test_loggers.py."

import sys
from dataclasses import replace
import pytest
from slotnb.core import SlotnbError
from slotnb.runs.config import TrainConfig
from slotnb.train import fit


def test_a_missing_library_is_said_before_anything_is_computed(tmp_path, few_scenes, monkeypatch):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    config = TrainConfig(data_dir=str(few_scenes), save_dir=str(tmp_path / 'run'), logger='wandb')
    with pytest.raises(SlotnbError, match=r'logger wandb needs wandb.*slotnb\[wandb\]'):
        fit(config, False)
    assert not (tmp_path / 'run').exists()
    with pytest.raises(SlotnbError, match="logger 'mlflow' is unknown; choose tensorboard, wandb"):
        replace(config, logger='mlflow')
