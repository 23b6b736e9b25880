"""What training on clips gives: from a still run and from nothing, with each loss over time, three seeds.

    python reports/training_on_clips/study.py [data_dir]

writes study.csv, clips.csv and strips.npz beside this file, for the page `reports/video_training`. Finished runs are kept in the cache."""

import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from slotnb.core import cache_dir
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures
from slotnb.metrics import hard_masks
from slotnb.runs.config import STILL, TrainConfig
from slotnb.runs.inputs import prepare
from slotnb.train import fit
from slotnb.video.model import build_model
from slotnb.video.score import clip_masks, score_clips

SEEDS, HERE = range(3), Path(__file__).parent
LOSSES = 'slots', 'contrast', 'similarity'
SHOWN = ('still, frame by frame', 'still, carried', 'from still, slots', 'from still, contrast')
EPOCHS = dict(still=12, warm=8, nothing=12)
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
    plan |= {f'from nothing, {loss}': replace(config, loss=loss) for loss in LOSSES}
    return still, {
        k: replace(c, save_dir=f'{config.save_dir}/{k}'.replace(', ', '_').replace(' ', '_')) for k, c in plan.items()
    }


def predicted(model, run, data):
    "Labels (t h w) of the first three test clips, one label a slot."
    feats = LazyFeatures(data.test, run.normalizer)
    for clip in data.clips['test'][:3]:
        size = data.scenes['test'][clip.rows[0].item()].image.shape[:2]
        yield np.stack(
            [hard_masks(m, size, model.grid) for m in clip_masks(model, feats, clip, run.config.seed)]
        ).astype(np.uint8)


def main(data_dir='data/movi_a_clips'):
    rows, strips, tables = [], {}, []
    folder = cache_dir() / 'training_on_clips' / Path(data_dir).name
    data = prepare(TrainConfig(**COMMON, data_dir=data_dir))

    def add(name, seed, run, model):
        out = folder / f'scores-{seed}-{name}'.replace(', ', '_').replace(' ', '_')
        feats = LazyFeatures(data.test, run.normalizer)
        scores = score_clips(model, feats, data.clips['test'], data.scenes['test'], run.config.seed, out)
        rows.append(dict(arm=name, seed=seed) | scores)
        tables.append(pd.read_csv(out / 'test_clips.csv').assign(arm=name, seed=seed))
        if seed == 0 and name in SHOWN:
            strips.update({f'{name}/{i}': x for i, x in enumerate(predicted(model, run, data))})
            np.savez_compressed(HERE / 'strips.npz', **strips)
        pd.DataFrame(rows).to_csv(HERE / 'study.csv', index=False, float_format='%.4f')
        pd.concat(tables).to_csv(HERE / 'clips.csv', index=False, float_format='%.4f')
        print(name, seed, {k: round(100 * v, 1) for k, v in scores.items()}, flush=True)

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
