"""What training on clips gives: from a still run and from nothing, with each loss over time, three seeds.

    python reports/training_on_clips/study.py [data_dir]

writes study.csv and strips.npz beside this file. Finished runs are kept in the cache. It has not been run to its end
yet: on two busy cores it takes more than an hour."""

import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from slotnb.core import cache_dir
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures
from slotnb.metrics import evaluate_scene, hard_masks
from slotnb.runs.config import STILL, TrainConfig
from slotnb.runs.inputs import prepare
from slotnb.train import fit
from slotnb.video.identity import identity_scores, object_tracks
from slotnb.video.model import build_model
from slotnb.video.score import clip_masks

SCORES = 'fg_ari', 'ari', 'mbo'
SEEDS, HERE = range(3), Path(__file__).parent
LOSSES = 'slots', 'contrast', 'similarity'
SHOWN = ('still, frame by frame', 'still, carried', 'from still, slots', 'from still, contrast')
EPOCHS = dict(still=8, warm=6, nothing=8)
COMMON = dict(mode='video', max_frames=0, resolution='224', warmup_epochs=2, num_epochs=EPOCHS['nothing'])


def still_of(config):
    "The same run on single frames."
    return replace(config, mode='still', num_epochs=EPOCHS['still'], **{k: v[0] for k, v in STILL.items()})


def runs_of(config):
    "Name, video configuration and whether it is trained; the still run comes first."
    still = still_of(replace(config, save_dir=f'{config.save_dir}/still'))
    warm = dict(
        warm_start=str(still.run_dir), lr=config.lr / 4, clip_norm=0.05, num_epochs=EPOCHS['warm'], warmup_epochs=1
    )
    plan = {f'from still, {loss}': replace(config, loss=loss, **warm) for loss in LOSSES}
    plan |= {f'from nothing, {loss}': replace(config, loss=loss) for loss in ('contrast',)}
    return still, {
        k: replace(c, save_dir=f'{config.save_dir}/{k}'.replace(', ', '_').replace(' ', '_')) for k, c in plan.items()
    }


def score(model, run, data):
    "Scores of the test clips, one label a slot; labels (t h w) of the first three of them."
    feats, rows, tracks, shown = LazyFeatures(data.test, run.normalizer), [], [], []
    for clip in data.clips['test']:
        samples = [data.scenes['test'][i] for i in clip.rows.tolist()]
        true = np.stack([s.segmentation for s in samples])
        masks = clip_masks(model, feats, clip, run.config.seed)
        pred = np.stack([hard_masks(m, true.shape[1:], model.grid) for m in masks]).astype(np.uint8)
        whole, frames = (
            evaluate_scene(true, pred),
            pd.DataFrame([evaluate_scene(*pair) for pair in zip(true, pred)]).mean(),
        )
        rows.append({f'{k}_video': whole[k] for k in SCORES} | {f'{k}_image': frames[k] for k in SCORES})
        tracks.append(object_tracks(true, pred, samples[0].materials))
        shown += [pred] if len(shown) < 3 else []
    return pd.DataFrame(rows).mean().to_dict() | identity_scores(pd.concat(tracks)), shown


def main(data_dir='data/movi_a_clips'):
    rows, strips = [], {}
    folder = cache_dir() / 'training_on_clips' / Path(data_dir).name
    data = prepare(TrainConfig(**COMMON, data_dir=data_dir))

    def add(name, seed, run, model):
        scores, shown = score(model, run, data)
        rows.append(dict(arm=name, seed=seed) | scores)
        if seed == 0 and name in SHOWN:
            strips.update({f'{name}/{i}': x for i, x in enumerate(shown)})
            np.savez_compressed(HERE / 'strips.npz', **strips)
        pd.DataFrame(rows).to_csv(HERE / 'study.csv', index=False, float_format='%.4f')
        print(name, seed, {k: round(100 * v, 1) for k, v in scores.items() if 'metal' not in k}, flush=True)

    for part in ('still', 'nothing'):
        for seed in SEEDS:
            config = TrainConfig(
                **COMMON, data_dir=data_dir, seed=seed, save_dir=str(folder / f'seed{seed}'), device='cpu'
            )
            still, plan = runs_of(config)
            if part == 'still':
                run = load_run(fit(still, show_progress=False, data=data))
                add('still, frame by frame', seed, run, run.model)
                model = build_model(config, run.normalizer.out_dim, tuple(run.record['grid']))
                model.load_state_dict(run.model.state_dict(), strict=False)  # the predictor begins as the identity
                add('still, carried', seed, run, model.eval())
            for name, c in plan.items():
                if name.startswith(f'from {part}'):
                    run = load_run(fit(c, show_progress=False, data=data))
                    add(name, seed, run, run.model)


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(*sys.argv[1:])
