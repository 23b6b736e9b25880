"""Patch colors, and what the ± of a table contains: runs of the default recipe, paired by seed.

`python reports/objects/colors.py` trains every arm, scores it on the 40 validation scenes of `ablation.py`, on the test
scenes or on both, and writes colors.csv, colors_causes.csv and colors_test_*.png beside this file. Finished runs are
kept. `CHOSEN` was set after the validation scenes had been scored, and before its runs were scored on the test scenes.
"""

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from textwrap import fill
from typing import NamedTuple
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm
from ablation import FOLDER, ROOT, SCORES, features_of, validation_scenes
from finer import CAUSES
from slotnb.core import batches, read_json, write_json
from slotnb.evaluate import load_run
from slotnb.model import outputs
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_labels, evaluate_masks, evaluate_scene
from slotnb.plots import match_colors, overlay, panels
from slotnb.refine import merge_slots, refine_masks
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.tokens import join_colors
from slotnb.train import fit

HERE, STUDY = Path(__file__).parent, FOLDER / 'colors'
COMMITTED = ROOT / 'data/movi_a_subset'


class Arm(NamedTuple):
    settings: dict = {}
    seeds: int = 5
    splits: tuple = ('validation',)  # that are scored; the validation scenes with the first five seeds
    env: dict = {}


BOTH = ('validation', 'test')
AVX2 = dict(ATEN_CPU_CAPABILITY='avx2', ONEDNN_MAX_CPU_ISA='AVX2')  # of torch's own kernels and oneDNN
ORDER = dict(MKL_CBWR='COMPATIBLE')  # matrix products of MKL by kernels that add in another order
DEFAULT, CHOSEN = 'default recipe', 'color 1'
ARMS = {
    DEFAULT: Arm(seeds=6, splits=BOTH),
    'color 1': Arm(dict(color=1.0), splits=BOTH),
    'color 3': Arm(dict(color=3.0), seeds=3),
    'AVX2': Arm(seeds=1, splits=('test',), env=AVX2),
    'other matrix products': Arm(seeds=2, splits=('test',), env=ORDER),
}


def splits_of(name, seed):
    return [s for s in ARMS[name].splits if s == 'test' or seed < 5]


def config_of(name, seed):
    arm = ARMS[name]
    folder = STUDY / f'{name.replace(" ", "-")}-seed{seed}'
    return TrainConfig(data_dir=str(COMMITTED), save_dir=str(folder), seed=seed, device='cpu', **arm.settings)


@torch.no_grad()
def score(config, split):
    "Scores of every scene, refined labels, and on validation scenes the scores without each cause of loss."
    run = load_run(config.run_dir)
    scenes = validation_scenes() if split == 'validation' else open_dataset(COMMITTED, 'test', progress=False)
    net = frozen_backbone(config)
    feats = LazyFeatures(features_of(run, net, scenes), run.normalizer)
    images, tables, labels = iter(scenes), [], []
    for x, out in zip(batches(feats, 8), outputs(run.model, feats, config.seed, 8)):
        some = [*islice(images, len(x))]
        merged = [merge_slots(m, f, net.grid) for m, f in zip(out.attn, x)]
        refined = [refine_masks(s.image, m, grid=net.grid) for s, m in zip(some, merged)]
        parts = [evaluate_masks(some, out.attn, 'attn', net.grid), evaluate_masks(some, merged, 'merged', net.grid)]
        parts.append(evaluate_labels(some, refined, 'refined'))
        tables.append(pd.concat([t.set_index(['scene', 'frame']) for t in parts], axis=1))
        labels += refined
    if split == 'validation':
        causes = {}
        for cause, change in CAUSES.items():
            changed = [evaluate_scene(s.segmentation, change(s.segmentation, y)) for s, y in zip(scenes, labels)]
            causes[cause] = pd.DataFrame(changed)[[*SCORES]].mean().to_dict()
        write_json(config.run_dir / 'causes.json', causes)
    np.savez_compressed(config.run_dir / f'{split}.npz', labels=np.stack(labels).astype(np.uint8))
    pd.concat(tables).to_csv(config.run_dir / f'{split}.csv')


class Joined:
    "A backbone with colors whose tokens without them are in the cache; saves a pass of the network for each weight."

    def __init__(self, config, dataset):
        self.net, plain = frozen_backbone(config), frozen_backbone(replace(config, color=0.0))
        self.device, self.record = self.net.device, self.net.record
        tokens = extract(plain, dataset, show_progress=False)
        self.known = {s.image.transpose(2, 0, 1).tobytes(): x for s, x in zip(dataset, tokens)}

    def __call__(self, images):
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.net.spec.mean, self.net.spec.std))
        tokens = torch.stack([self.known[im.numpy().tobytes()] for im in images])
        pixels = self.net.preprocess(images) * std + mean
        return join_colors(tokens, pixels, self.net.spec.patch_size, self.net.color)


def train_and_score(name, seed):
    torch.set_num_threads(1)
    config = config_of(name, seed)
    left = [s for s in splits_of(name, seed) if not (config.run_dir / f'{s}.csv').is_file()]
    if left and config.color:
        committed = [open_dataset(COMMITTED, split, progress=False) for split in ('train', 'test')]
        for dataset in (*committed, validation_scenes()):
            extract(Joined(config, dataset), dataset, show_progress=False)
    if left:
        fit(config, show_progress=False)
    for split in left:
        score(config, split)


def run_arm(name, seed):
    "Train and score in a process of its own, which has the arm's instruction set."
    env = os.environ | ARMS[name].env | dict(OMP_NUM_THREADS='1')
    subprocess.run([sys.executable, __file__, name, str(seed)], env=env, check=True)


def collect(runs):
    "Mean scores of each run and split, and the scores without each cause of loss."
    columns, rows, causes = [f'{m}_{k}' for k in ('attn', 'merged', 'refined') for m in SCORES], [], []
    for name, seed in runs:
        folder, about = config_of(name, seed).run_dir, dict(arm=name, seed=seed)
        for split in splits_of(name, seed):
            rows.append(about | dict(split=split) | pd.read_csv(folder / f'{split}.csv')[columns].mean().to_dict())
        if 'validation' in splits_of(name, seed):
            causes += [about | dict(cause=c) | x for c, x in read_json(folder / 'causes.json').items()]
    return pd.DataFrame(rows).round(4), pd.DataFrame(causes).round(4)


def draw(names, seed, ids):
    "Image, ground truth and refined segments of some test scenes, one row for each arm."
    every = open_dataset(COMMITTED, 'test', progress=False)
    scenes = [every[i] for i in ids]
    rows = dict(image=[s.image for s in scenes])
    rows['ground truth'] = [overlay(s.image, s.segmentation) for s in scenes]
    for name in names:
        labels = np.load(config_of(name, seed).run_dir / 'test.npz')['labels'][[*ids]].astype(int)
        rows[name] = [overlay(s.image, x, match_colors(s.segmentation, x)) for s, x in zip(scenes, labels)]
    titles = [s.name.removeprefix('scene_') for s in scenes]
    return panels([x for row in rows.values() for x in row], titles, len(ids), 1.3, [fill(r, 12) for r in rows])


if __name__ == '__main__':
    if sys.argv[1:]:
        train_and_score(sys.argv[1], int(sys.argv[2]))
        sys.exit()
    runs = [(name, seed) for name, arm in ARMS.items() for seed in range(arm.seeds)]
    for run in tqdm(runs, 'runs', unit='run'):
        run_arm(*run)
    for table, file in zip(collect(runs), ('colors.csv', 'colors_causes.csv')):
        table.to_csv(HERE / file, index=False)
    for i, ids in enumerate((range(12), range(12, 24)), 1):
        file = HERE / f'colors_test_{i}.png'
        draw((DEFAULT, CHOSEN), 0, ids).savefig(file, dpi=100)
        Image.open(file).convert('RGB').quantize(255).save(file)
