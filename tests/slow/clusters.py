"A small sweep, and what two sweeps must have in common."

import json
import threading
import time
from conftest import ROOT
from slotnb.sweep import SweepConfig

SMALL = dict(layer='-1', resolution='spec', grid_size='spec', slot_dim=32, hidden_dim=32, batch_size=2, warmup_epochs=1)
SEEDS = (0, 1, 2)


def small_sweep(folder, data, **execution):
    "Three runs, which two nodes do not compute at once."
    return SweepConfig(
        out_dir=str(folder),
        backbone=('dinov2_vits14',),
        normalizer=('instance',),
        seed=SEEDS,
        num_epochs=20,
        set=tuple(f'{k}={v}' for k, v in SMALL.items()),
        notebook=str(ROOT / 'reports/backbone_run.ipynb'),
        data_dir=str(data),
        **execution,
    )


def same_runs(one, two):
    "Every file that a run leaves is equal to the last digit, but for times and folders."
    runs = sorted(p.parent.relative_to(one) for p in one.glob('*/*/result.json'))
    assert len(runs) == len(SEEDS)
    for run in runs:
        for name in ('best_model.safetensors', 'metrics.csv', 'test_scenes.csv'):
            assert (one / run / name).read_bytes() == (two / run / name).read_bytes(), (run, name)
        a, b = (json.loads((d / run / 'result.json').read_text()) for d in (one, two))
        for result in (a, b):  # the digest covers the time
            del result['seconds_per_epoch'], result['digest']
        assert a == b, run


def when_training(folder, f):
    "Call a function in a thread once a run in the folder has finished some epochs. Returns what it has called."
    called = []

    def watch():
        for _ in range(3000):
            rows = [p for p in folder.rglob('metrics.csv') if p.read_bytes().count(b'\n') > 3]
            if rows:
                called.append(f())
                return
            time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    return called
