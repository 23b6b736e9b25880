"""How time and memory of a run grow with the number of scenes: a real `fit` and `evaluate`, in a process of its own
for each size.

Features are random and come from a stand-in backbone through the real cache, which is deleted again. The exponent
is the slope of log against log.

python benchmarks/scale.py --scenes 60 600 6000"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
import numpy as np
import torch
from slotnb import train
from slotnb.core import digest
from slotnb.data import Dataset, Entry, Sample
from slotnb.evaluate import evaluate
from slotnb.runs import inputs
from slotnb.runs.config import preset

# tensors above 1 MB go back to the system when they are freed, so that peaks are the run's and not the allocator's
MALLOC = dict(MALLOC_MMAP_THRESHOLD_='1000000')
PATCHES, DIM = 256, 384


class Blank(Dataset):
    "Black images of 8 x 8 pixels: reading them costs next to nothing."

    has_ground_truth = False

    def __init__(self, n, split):
        super().__init__(f'blank/{split}', [Entry(f'scene_{i}', 0, i) for i in range(n)])

    def read(self, entry):
        return Sample(entry.name, entry.frame, Path('blank'), np.zeros((8, 8, 3), np.uint8), None, [])

    def fingerprint(self, progress=True):
        return digest(len(self))


class StandIn:
    "A backbone that returns parts of one random block."

    device = torch.device('cpu')
    record = dict(backbone='stand-in', grid=[16, 16], dim=DIM)

    def __init__(self):
        self.pool, self.count = torch.randn(64, PATCHES, DIM).half(), 0

    def __call__(self, images):
        self.count += len(images)
        return self.pool[self.count % 56 :][: len(images)]


class OwnMemory:
    """Largest number of bytes that only this process has (RssAnon), sampled in a thread; mapped pages of the cache do
    not count."""

    def __enter__(self):
        self.base = self.peak = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def watch(self):
        while not self.over.wait(0.004):
            self.peak = max(self.peak, self.now())

    def now(self):
        return 1024 * int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def fit_side(scenes, settings, in_memory):
    "One size, in a process of its own: seconds per epoch, and memory beyond what the libraries take."
    inputs.open_split = lambda config, split, progress: Blank(scenes, split)
    inputs.frozen_backbone = lambda config: StandIn()
    if in_memory is not None:
        inputs._IN_MEMORY = in_memory
    with tempfile.TemporaryDirectory(prefix='slotnb_scale_') as folder:
        os.environ['SLOTNB_CACHE'] = folder
        config = replace(preset('version_0_1', device='cpu', save_dir=f'{folder}/run'), **settings)
        inputs.prepare(config, False)  # the cache is written before anything is measured
        with OwnMemory() as training:
            run_dir = train.fit(config, False)
        with OwnMemory() as evaluating:
            evaluate(run_dir, False)
        seconds = [float(line.split(',')[1]) for line in (run_dir / 'timing.csv').read_text().split()]
    return dict(
        scenes=scenes,
        seconds=statistics.median(seconds),
        train_mb=(training.peak - training.base) / 1e6,
        evaluate_mb=(evaluating.peak - evaluating.base) / 1e6,
        features_mb=scenes * PATCHES * DIM * 4 / 1e6,
    )


def scale_scenes(sizes, settings={}, in_memory=None, threads=2):
    "`fit` of the default model against the number of scenes."
    rows = []
    for n in sizes:
        epochs = dict(num_epochs=max(1, min(5, 600 // n)), warmup_epochs=0)
        side = json.dumps([n, epochs | settings, in_memory])
        command = [sys.executable, __file__, '--side', side, '--threads', str(threads)]
        done = subprocess.run(command, env=os.environ | MALLOC, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    columns = {k: [r[k] for r in rows] for k in rows[0]}
    slope = float(np.polyfit(np.log(sizes), np.log(columns['seconds']), 1)[0]) if len(sizes) > 1 else None
    return dict(threads=threads, kept_mb=(inputs._IN_MEMORY if in_memory is None else in_memory) / 1e6,
                exponent=slope, **columns)  # fmt: skip


def bench_scale(small=False, device='cpu', progress=lambda text: None):
    tiny = dict(slot_dim=16, hidden_dim=16, num_slots=3)
    return scale_scenes((20, 40), tiny, threads=1) if small else scale_scenes((60, 200, 600))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--scenes', type=int, nargs='+', default=[60, 200, 600], help='training scenes')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--side', help=argparse.SUPPRESS)
    c = p.parse_args()
    torch.set_num_threads(c.threads)
    print(json.dumps(fit_side(*json.loads(c.side)) if c.side else scale_scenes(c.scenes, threads=c.threads)))
