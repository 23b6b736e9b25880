"""Which part of the source report's video model collapses: small models, one change at a time, three seeds.

    python reports/predictor/study.py [data_dir]

writes study.csv beside this file, for the page `reports/slot_predictor`. Features are cached as always."""

import sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from tqdm import tqdm
from slotnb.core import generator
from slotnb.diagnostics import collapse, slot_stats
from slotnb.features import LazyFeatures, extract
from slotnb.losses import feature_mse, feature_spread
from slotnb.metrics import evaluate_scene, hard_masks
from slotnb.normalizer import Moments, Normalizer
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.inputs import frozen_backbone, open_split
from slotnb.train import make_loss, make_optimizer, set_lr, train_step
from slotnb.video.batches import ClipFeatures, renumbered, training_chunks
from slotnb.video.clips import Clip, clip_chunks, clip_index
from slotnb.video.collapse import time_collapse, time_stats
from slotnb.video.identity import object_tracks
from slotnb.video.model import build_model

SCORES = 'fg_ari', 'ari', 'mbo'
SEEDS, STEPS, GRID, FRAMES, CLIPS = range(3), 150, (8, 8), 12, 10
# the source report's recipe with the attention decoder, in which the masks are slot attention's, run base runs it:
# the GRU's output is carried through a predictor that begins with random weights; small, so that it takes minutes
BASE = PRESETS['source_report'] | dict(
    mode='video', max_frames=0, resolution='224', clip_length=4, carry='hidden', predictor='xavier', slot_dim=64,
    hidden_dim=128, decoder='attention', normalizer='none', feature_std=2.41, batch_size=2, lr=0.001, device='cpu',
    next_iters=2,
)  # fmt: skip
ARMS = {
    'base': {},
    'predictor: none': dict(predictor='none'),
    'predictor: begins as the identity': dict(predictor='identity'),
    'carried: mean of the cell, identity': dict(carry='cell', predictor='identity'),
    'scale: 0.47, as CLIP': dict(feature_std=0.47),
    'scale: instance normalization': dict(normalizer='instance'),
    'target: learned': dict(target='learned'),
    'batch: 8 clips': dict(batch_size=8),
    'decoder: mlp, as the report': dict(decoder='mlp'),
    'decoder: mlp, predictor: none': dict(decoder='mlp', predictor='none'),
    'stills': dict(still=True),
    'stills, target: learned': dict(target='learned', still=True),
    'stills, decoder: mlp': dict(decoder='mlp', still=True),
}


def tokens(feats):
    "The last block's tokens (s 64 384), averaged over 2 x 2 patches."
    x = feats.load()[..., -384:].unflatten(1, (16, 16)).unflatten(2, (8, 2)).unflatten(1, (8, 2))
    return x.mean((2, 4)).flatten(1, 2)


class Stills(torch.nn.Module):
    "The model of clips on their single frames."

    def __init__(self, model):
        super().__init__()
        self.model, self.init = model, model.init

    def forward(self, feats, noise):
        return self.model(feats.flatten(0, 1), noise)


def train(config, data, still):
    "A model after `STEPS` steps, with a linear warm-up of a tenth of them."
    feats = LazyFeatures(data['train'] * config.feature_std / data['std'], Normalizer(config.normalizer)).load()
    model = build_model(config, feats.shape[-1], GRID)
    opt, loss = make_optimizer(config, model.parameters()), make_loss(config)
    loss = make_loss(TrainConfig(**PRESETS['source_report'])) if still else loss
    step, epoch = 0, 0
    while step < STEPS:
        chunks = training_chunks(feats, data['clips']['train'], config, epoch)
        noise = generator(config.seed, 'slots', epoch)
        for batch in torch.randperm(len(chunks), generator=generator(config.seed, 'order', epoch)).split(
            config.batch_size
        ):
            set_lr(opt, config.lr * min(1, (step + 1) / (0.1 * STEPS)))
            x = chunks[batch]
            n = len(x) * (config.clip_length if still else 1)
            train_step(Stills(model) if still else model, loss, opt, x, model.init.draw(n, noise), config.clip_norm)
            step += 1
            if step == STEPS:
                break
        epoch += 1
    return model.eval()


@torch.no_grad()
def measure(model, config, data, still):
    "Statistics and scores of the held-out clips, `FRAMES` frames from the first."
    norm, clips = Normalizer(config.normalizer), data['clips']['val']
    rows = clip_chunks([Clip(c.name, c.rows[:FRAMES], c.frames[:FRAMES], 1.0) for c in clips], FRAMES, 1)
    feats = LazyFeatures(data['val'] * config.feature_std / data['std'], norm).load()
    x = ClipFeatures(feats, rows)[:]
    noise = model.init.draw(x.flatten(0, 1).shape[0] if still else len(x), generator(config.seed, 'evaluation'))
    if still:
        out = model(x.flatten(0, 1), noise)
        over_time, images, masks = {}, out, out.attn.unflatten(0, x.shape[:2])
    else:
        out = model(x, noise)
        over_time, images, masks = time_stats([out]), out.images(), out.attn
    fvu = feature_mse(images.recon, images.target) / feature_spread(images.target)
    usage = slot_stats(images.slots, images.masks)
    names = 'slot_cosine', 'mask_entropy', 'effective_slots', 'largest_share'
    kept = {k: images.target.std().item() / feats.std().item() for k in ('target_std_kept',)}
    stats = dict(fvu=fvu.item()) | {k: usage[k] for k in names} | over_time | kept
    shown = images.masks.unflatten(0, x.shape[:2]) if config.decoder == 'mlp' else masks
    scores = []
    for clip, m in zip(rows.tolist(), shown):
        true = np.stack([data['scenes'][i].segmentation for i in clip])
        pred = np.stack([hard_masks(k, true.shape[1:], GRID) for k in m])
        whole, frames = (
            evaluate_scene(true, pred),
            pd.DataFrame([evaluate_scene(*pair) for pair in zip(true, pred)]).mean(),
        )
        found = {f'{k}_video': whole[k] for k in SCORES} | {f'{k}_image': frames[k] for k in SCORES}
        scores.append(found | dict(switches=object_tracks(true, pred).switches.mean()))
    found = '; '.join(filter(None, (collapse(usage | stats), time_collapse(over_time))))
    return stats | pd.DataFrame(scores).mean().to_dict() | dict(collapse=found)


def main(data_dir='data/movi_a_clips'):
    config = TrainConfig(mode='video', max_frames=0, data_dir=data_dir, resolution='224')
    scenes = open_split(config, 'train')
    scenes.entries = [e for e in scenes.entries if e.name in scenes.scenes[:CLIPS]]
    x, clips = tokens(extract(frozen_backbone(config), scenes)), clip_index(scenes)
    held_out = [c for i, c in enumerate(clips) if i % 3 == 2]  # the test clips are not used
    parts = dict(train=[c for i, c in enumerate(clips) if i % 3 != 2], val=held_out)
    known = {name: x[torch.cat([c.rows for c in part])] for name, part in parts.items()}
    known |= dict(
        clips={name: renumbered(part) for name, part in parts.items()}, std=Moments.of(known['train']).total_std
    )
    known['scenes'] = [scenes[i] for c in held_out for i in c.rows.tolist()]
    rows, path = [], Path(__file__).with_name('study.csv')
    for seed in SEEDS:
        for name, change in tqdm(ARMS.items(), f'seed {seed}'):
            change, still = {k: v for k, v in change.items() if k != 'still'}, 'still' in change
            config = TrainConfig(**BASE | change, data_dir=data_dir, seed=seed)
            rows.append(dict(arm=name, seed=seed) | measure(train(config, known, still), config, known, still))
            pd.DataFrame(rows).to_csv(path, index=False, float_format='%.4f')


if __name__ == '__main__':
    torch.set_num_threads(1)
    main(*sys.argv[1:])
