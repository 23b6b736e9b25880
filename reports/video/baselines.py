"""What a model for video has to beat, and what it reaches: masks of the 12 test clips, linked, carried or trained.

    python reports/video/baselines.py [fixed] [stills] [untrained] [trained] [kmeans]

scores parts of the table, all of them by default. Everything starts from the shipped model of stills, `movi_a`,
whose initial slots do not depend on a seed. `trained` trains it on the training clips with three seeds first, as
`slotnb train --mode video --data_dir data/movi_a_clips --warm_start movi_a --num_epochs 50 --seed 0` does. Nothing was
chosen on the test clips. After each clip the rows of the part are written to baselines.csv (one row per clip) and
tracks.csv (one row per object) beside this file, and labels of the first clips to strips.npz. Finished runs and
features are kept in the cache.
"""

import argparse
from dataclasses import replace
from functools import cache
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from slotnb.baselines import block_masks, kmeans_masks
from slotnb.core import cache_dir
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.refine import merge_slots
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import fit
from slotnb.video.clips import clip_index
from slotnb.video.identity import mot_scores, object_tracks
from slotnb.video.link import carried_masks, clip_labels, link_by_truth, link_masks, still_masks
from slotnb.video.metrics import evaluate_clip
from slotnb.video.model import build_model
from slotnb.video.score import clip_labels as frame_labels
from slotnb.video.score import clip_masks

HERE, SEEDS = Path(__file__).parent, (0, 1, 2)
ROOT, MEMORY = HERE.parent.parent, 0.8
PARTS = ('fixed', 'stills', 'untrained', 'trained', 'kmeans')
SHOWN = (
    'still slots, linked by masks and features',
    'trained on clips, merged',
    'trained on clips, linked by ground truth',
)


def video_config(seed):
    "The run of mode video of a seed."
    folder, data = cache_dir() / 'video_baselines' / f'trained-seed{seed}', str(ROOT / 'data/movi_a_clips')
    settings = dict(mode='video', max_frames=0, warm_start='movi_a', num_epochs=50)
    return TrainConfig(**settings, data_dir=data, save_dir=str(folder), seed=seed)


@cache
def trained_run(seed):
    "The run of a seed, trained if it is not yet."
    return load_run(fit(video_config(seed)))


@cache
def still_run():
    return load_run('movi_a')


def untrained(still):
    "The model of mode video with the weights of a model of stills, before the first step."
    model = build_model(video_config(0), still.normalizer.out_dim, tuple(still.record['grid']))
    model.load_state_dict(still.model.state_dict(), strict=False)  # the predictor begins as the identity
    return replace(still, model=model.eval())


class Scorer:
    "Labels of a clip under the names of their methods."

    def __init__(self, raw, grid, seeds):
        self.raw, self.grid, self.seeds = raw, grid, seeds

    def fixed(self, clip, samples, true):
        "Labels that need neither features nor a seed."
        yield 'one segment', 0, np.zeros(true.shape, np.int16)
        yield '12 fixed blocks', 0, self.labels([torch.from_numpy(block_masks(self.grid))] * len(true), true)

    def kmeans(self, clip, samples, true):
        "k-means of each frame, linked."
        for seed in self.seeds:
            raw = [self.raw[i : i + 1][0] for i in clip.rows.tolist()]
            found = [torch.from_numpy(kmeans_masks(x, 11, seed)).float() for x in raw]
            yield from self.linked('k-means', seed, found, raw, true)

    def stills(self, clip, samples, true):
        "Slots of the model for stills, linked or carried."
        run = still_run()
        feats = [self.normalized(run)[i : i + 1][0] for i in clip.rows.tolist()]
        seed = SEEDS[0]
        found = [*still_masks(run.model, feats, seed)]
        yield 'still slots, not linked', seed, (labels := self.labels(found, true))
        yield from self.linked('still slots', seed, found, feats, true)
        yield 'still slots, linked by ground truth', seed, link_by_truth(labels, true)
        for carry, name in dict(hidden='slots carried as the GRU leaves them', cell='slots carried as cells').items():
            yield name, seed, self.labels(carried_masks(run.model, feats, carry, seed), true)

    def untrained(self, clip, samples, true):
        "The model of mode video without training on clips."
        run = untrained(still_run())
        yield from self.video('not trained on clips', run, SEEDS[0], clip, samples, true)

    def trained(self, clip, samples, true):
        "The same model, trained on clips."
        for seed in self.seeds:
            run = trained_run(seed)
            yield from self.video('trained on clips', run, seed, clip, samples, true)

    def video(self, name, run, seed, clip, samples, true):
        feats, kinds = self.normalized(run), {}
        masks = clip_masks(run.model, feats, clip, seed)
        for i, sample, attn in zip(clip.rows.tolist(), samples, masks, strict=True):
            merged = merge_slots(attn, feats[i : i + 1][0], self.grid)
            found = dict(unmerged=self.labels([attn], true)[0]) | frame_labels(merged, sample, self.grid)
            for kind, labels in found.items():
                kinds.setdefault(kind, []).append(labels.astype(np.int16))
        for kind, labels in kinds.items():
            yield f'{name}, {kind}', seed, np.stack(labels)
        yield f'{name}, linked by ground truth', seed, link_by_truth(np.stack(kinds['merged']), true)

    def linked(self, name, seed, found, feats, true):
        for by in ('masks', 'features', 'both'):
            how = 'linked by ' + by.replace('both', 'masks and features')
            yield f'{name}, {how}', seed, self.labels(link_masks(zip(found, feats), by, MEMORY), true)

    def normalized(self, run):
        return LazyFeatures(self.raw, lambda x: run.normalizer(x * run.scale).detach())

    def labels(self, masks, true):
        return clip_labels(masks, true.shape[1:], self.grid)


def merged_table(path, new, part, seeds):
    "Write the rows of a part and its seeds in place of those that are there."
    old = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=['part', 'seed'])
    old = old[(old.part != part) | ~old.seed.isin(seeds)]
    table = pd.concat([old, pd.DataFrame(new)])
    order = table.part.map(PARTS.index)
    table.iloc[np.argsort(order, kind='stable')].to_csv(path, index=False, float_format='%.5f')


def score(part, clips, dataset, scorer):
    rows, tracks, seeds = [], [], scorer.seeds
    for clip in tqdm(clips, part):
        samples = [dataset[i] for i in clip.rows.tolist()]
        true, materials = np.stack([s.segmentation for s in samples]), samples[0].materials
        for method, seed, labels in getattr(scorer, part)(clip, samples, true):
            about = dict(part=part, clip=clip.name, method=method, seed=seed)
            rows.append(about | evaluate_clip(true, labels, materials) | mot_scores([(true, labels)]))
            tracks.append(object_tracks(true, labels, materials).assign(**about))
            if seed == SEEDS[0] and method in SHOWN and clip in clips[:3]:
                strips = dict(np.load(HERE / 'strips.npz')) if (HERE / 'strips.npz').exists() else {}
                np.savez_compressed(HERE / 'strips.npz', **strips | {f'{clip.name}/{method}': labels.astype(np.uint8)})
        merged_table(HERE / 'baselines.csv', rows, part, seeds)
        merged_table(HERE / 'tracks.csv', pd.concat(tracks), part, seeds)


def main(parts, num_clips=None, seeds=SEEDS):
    dataset = open_dataset(ROOT / 'data/movi_a_clips', 'test', max_frames=0)
    clips, still = clip_index(dataset)[:num_clips], still_run()
    backbone = frozen_backbone(still.config)
    scorer = Scorer(extract(backbone, dataset), tuple(still.record['grid']), seeds)
    for part in parts:
        score(part, clips, dataset, scorer)


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}; all by default')
    parser.add_argument('--clips', type=int, help='number of test clips; all by default')
    parser.add_argument('--seeds', type=int, nargs='+', default=SEEDS, help='of trained and kmeans; 0 1 2 by default')
    args = parser.parse_args()
    torch.set_num_threads(1)
    main(args.parts or PARTS, args.clips, args.seeds)
