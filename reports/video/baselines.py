"""What a model for video has to beat: masks of single frames that are linked or carried, on the 12 test clips.

`python reports/video/baselines.py` trains the default recipe on the stills of `data/movi_a_subset` with three seeds and
scores every baseline on the test clips of `data/movi_a_clips`. Nothing is trained on clips, and nothing was chosen on
them. After each clip it writes baselines.csv (one row per clip), tracks.csv (one row per object) and strips.npz beside
this file; finished runs and features are kept in the cache. With `--shipped` it takes the shipped model, which is such
a run of seed 0, instead of the three runs, and with `--clips 4` the first four clips.
"""

import argparse
from copy import copy
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from slotnb.baselines import block_masks, kmeans_masks
from slotnb.core import cache_dir
from slotnb.evaluate import load_run
from slotnb.features import extract
from slotnb.formats.detect import open_dataset
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import fit
from slotnb.video.clips import clip_index
from slotnb.video.identity import mot_scores, object_tracks
from slotnb.video.link import carried_masks, clip_labels, link_by_truth, link_masks, still_masks
from slotnb.video.metrics import evaluate_clip

HERE, SEEDS = Path(__file__).parent, (0, 1, 2)
ROOT, MEMORY = HERE.parent.parent, 0.8
SHOWN = ('still slots, linked by masks and features', 'slots carried as cells', 'still slots, linked by ground truth')


def still_run(seed):
    "A run of the default recipe on stills."
    folder = cache_dir() / 'video_baselines' / f'still-seed{seed}'
    config = TrainConfig(data_dir=str(ROOT / 'data/movi_a_subset'), save_dir=str(folder), seed=seed)
    return load_run(fit(config))


def without_seed(shape, grid):
    "Labels of a clip that need neither features nor a seed."
    t, *size = shape
    yield 'one segment', np.zeros(shape, np.int16)
    yield '12 fixed blocks', clip_labels([torch.from_numpy(block_masks(grid))] * t, size, grid)


def clusters(raw, seed, size, grid):
    "k-means of each frame, linked."
    found = [torch.from_numpy(kmeans_masks(x, 11, seed)).float() for x in raw]
    for by in ('masks', 'features', 'both'):
        name = 'k-means, linked by ' + by.replace('both', 'masks and features')
        yield name, clip_labels(link_masks(zip(found, raw), by, MEMORY), size, grid)


def slots(run, feats, true, grid):
    "Slots of a model for stills, linked or carried."
    size = true.shape[1:]
    stills = [*still_masks(run.model, feats, run.config.seed)]
    yield 'still slots, not linked', (labels := clip_labels(stills, size, grid))
    for by in ('masks', 'features', 'both'):
        name = 'still slots, linked by ' + by.replace('both', 'masks and features')
        yield name, clip_labels(link_masks(zip(stills, feats), by, MEMORY), size, grid)
    yield 'still slots, linked by ground truth', link_by_truth(labels, true)
    for carry, name in dict(hidden='slots carried as the GRU leaves them', cell='slots carried as cells').items():
        yield name, clip_labels(carried_masks(run.model, feats, carry, run.config.seed), size, grid)


def of_clip(clip, dataset, runs, backbone):
    "Method, seed and labels (t h w) of a clip, and its ground truth."
    part, grid = copy(dataset), tuple(runs[0].record['grid'])
    part.entries = [dataset.entries[i] for i in clip.rows.tolist()]
    raw, true = extract(backbone, part, show_progress=False).load(), np.stack([s.segmentation for s in part])
    found = [(*x, SEEDS[0]) for x in without_seed(true.shape, grid)]
    for seed in SEEDS:
        found += [(*x, seed) for x in clusters(raw, seed, true.shape[1:], grid)]
    for run in runs:
        feats = run.normalizer(raw * run.scale).detach()
        found += [(*x, run.config.seed) for x in slots(run, feats, true, grid)]
    return found, true, part[0].materials


def main(num_clips=None, shipped=False):
    dataset = open_dataset(ROOT / 'data/movi_a_clips', 'test', max_frames=0)
    clips = clip_index(dataset)[:num_clips]
    runs = [load_run('movi_a')] if shipped else [still_run(seed) for seed in SEEDS]
    backbone = frozen_backbone(runs[0].config)
    rows, tracks, strips = [], [], {}
    for clip in tqdm(clips, 'clips'):
        found, true, materials = of_clip(clip, dataset, runs, backbone)
        for method, labels, seed in found:
            about = dict(clip=clip.name, method=method, seed=seed)
            rows.append(about | evaluate_clip(true, labels, materials) | mot_scores([(true, labels)]))
            tracks.append(object_tracks(true, labels, materials).assign(**about))
            if seed == SEEDS[0] and method in SHOWN and len(strips) < 3 * len(SHOWN):
                strips[f'{clip.name}/{method}'] = labels.astype(np.uint8)
        pd.DataFrame(rows).to_csv(HERE / 'baselines.csv', index=False, float_format='%.5f')
        pd.concat(tracks).to_csv(HERE / 'tracks.csv', index=False, float_format='%.5f')
        np.savez_compressed(HERE / 'strips.npz', **strips)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--clips', type=int, help='number of test clips; all by default')
    parser.add_argument('--shipped', action='store_true', help='the shipped model instead of three runs')
    args = parser.parse_args()
    main(args.clips, args.shipped)
