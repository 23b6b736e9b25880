"On a GPU: seconds per epoch of the committed scenes with either engine, and 15 runs as one stack against one run."

import tempfile
import time
from dataclasses import replace
from pathlib import Path
import pandas as pd
from slotnb.fast.many_models import train_many
from slotnb.runs.config import preset
from slotnb.train import fit

DATA = str(Path(__file__).parent.parent / 'data/movi_a_subset')


def bench_gpu(small=False, device='cuda', runs=15, num_epochs=60, progress=lambda text: None):
    "Epochs are timed by the runs themselves (timing.csv), runs and stack by the clock."
    if small:
        runs, num_epochs = 2, 3
    base = preset(
        'version_0_1', data_dir=DATA, device=device, num_epochs=num_epochs, train_precision='auto', warmup_epochs=1
    )
    found = dict(runs=runs, num_epochs=num_epochs, seconds_per_epoch={}, seconds_per_run={})
    with tempfile.TemporaryDirectory() as folder:
        fit(replace(base, num_epochs=2, save_dir=f'{folder}/warm'), show_progress=False)  # features and kernels
        for engine in ('torch', 'fast'):
            progress(engine)
            start = time.perf_counter()
            run = fit(replace(base, engine=engine, save_dir=f'{folder}/{engine}'), show_progress=False)
            found['seconds_per_run'][engine] = time.perf_counter() - start
            timing = pd.read_csv(run / 'timing.csv', names=['epoch', 'seconds'])
            found['seconds_per_epoch'][engine] = timing.seconds.median()
        progress(f'{runs} runs')
        start = time.perf_counter()
        plan = [replace(base, engine='fast', seed=i, save_dir=f'{folder}/stack{i}') for i in range(runs)]
        failed = train_many(plan, show_progress=False)
        assert not failed, failed
        found['seconds_of_stack'] = time.perf_counter() - start
        found['stack_in_runs'] = found['seconds_of_stack'] / found['seconds_per_run']['fast']
    return found
