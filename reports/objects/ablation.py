"""What each part of the default recipe gives: one part changed at a time, three seeds, scored on a validation set.

The validation set is rendered by `slotnb render` (40 scenes, seed 7) into the cache; the test scenes are not used.
`python reports/objects/ablation.py` writes ablation.csv, backgrounds.csv and masks.png beside this file; finished runs
are kept.
"""

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from textwrap import fill
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm
from slotnb.core import batches, cache_dir, read_json, write_json
from slotnb.evaluate import load_run
from slotnb.model import outputs
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_labels, evaluate_masks, hard_masks
from slotnb.plots import match_colors, overlay, panels
from slotnb.refine import background_slot, merge_slots, refine_masks
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import fit

ROOT = Path(__file__).parents[2]
FOLDER = cache_dir() / 'objects'
SEEDS = (0, 1, 2)
SMALL = dict(resolution='224', hidden_dim=128)  # for decoders that cost too much at 32x32 patches
VARIANTS = {
    'default recipe': {},
    'one block instead of two': dict(layer='-1'),
    '224 px, 16x16 patches': dict(resolution='224'),
    'pca instead of lda, one round': dict(normalizer='pca'),
    'two rounds': dict(rounds=2),
    'four rounds': dict(rounds=4),
    'instance normalization instead of a space': dict(normalizer='instance'),
    'Xavier weights': dict(weight_init='xavier'),
    'random slots': dict(slot_init='random'),
    'k-means slots': dict(slot_init='kmeans'),
    'no position': dict(projection='linear'),
    'attention decoder': dict(decoder='attention'),
    'no mirrored images': dict(flip=False),
    '15 slots': dict(num_slots=15),
    'the default of version 0.1': PRESETS['version_0_1'] | dict(num_epochs=60),
    'RANDOM WEIGHTS, not a result of the backbone': dict(weights='random'),
    'slot attention: multihead': dict(slot_attention='multihead'),
    'slot attention: weighted_sum': dict(slot_attention='weighted_sum'),
    'slot attention: implicit': dict(slot_attention='implicit'),
    'slot attention: bilevel, learned slots': dict(slot_attention='bilevel', slot_init='learned'),
    'learned slots': dict(slot_init='learned'),
    '224 px: mlp decoder': SMALL | dict(decoder='mlp'),
    '224 px: mlp_top_k decoder': SMALL | dict(decoder='mlp_top_k'),
    '224 px: slot_mixer decoder': SMALL | dict(decoder='slot_mixer'),
    '224 px: transformer decoder': SMALL | dict(decoder='transformer'),
}
SCORES = ('fg_ari', 'ari', 'mbo')


def validation_scenes():
    "40 scenes that nothing was trained on, rendered when they are first needed."
    from slotnb.scenes.render import render

    render(out_dir=str(FOLDER / 'validation'), scenes=40, split='validation', seed=7, samples=16)
    return open_dataset(FOLDER / 'validation', 'validation', progress=False)


def config_of(name, seed):
    folder = FOLDER / f'{list(VARIANTS).index(name):02}-seed{seed}'
    return TrainConfig(
        **VARIANTS[name]
        | dict(data_dir=str(ROOT / 'data/movi_a_subset'), save_dir=str(folder), seed=seed, device='cpu')
    )


def backgrounds(masks, grid):
    "The slot that each of three rules takes for the background."
    h, w = grid
    owner = masks.argmax(0).reshape(grid)
    border = torch.cat([owner[0], owner[-1], owner[:, 0], owner[:, -1]])
    most = lambda x: int(torch.bincount(x.flatten(), minlength=len(masks)).argmax())
    return dict(spread=background_slot(masks, grid), border=most(border), largest=most(owner))


def features_of(run, net, scenes):
    "Features of scenes, scaled as those that the run was trained on."
    return LazyFeatures(extract(net, scenes, show_progress=False), lambda x: x * run.scale)


def score(name, seed):
    "Train one run and score it on the validation scenes, if that is not done yet."
    torch.set_num_threads(1)
    config = config_of(name, seed)
    kept = Path(config.save_dir) / 'score.json'
    if kept.is_file():
        return read_json(kept)
    run = load_run(fit(config, show_progress=False))
    scenes, net = validation_scenes(), frozen_backbone(config)
    feats = LazyFeatures(features_of(run, net, scenes), run.normalizer)
    images, grid, rows, right = list(scenes), net.grid, [], []
    normalized = batches(feats, 8)
    i = 0
    for x, out in zip(normalized, outputs(run.model, feats, seed, 8)):
        some = images[i : i + len(x)]
        merged = [merge_slots(m, f, grid) for m, f in zip(out.attn, x)]
        refined = [refine_masks(s.image, m, grid=grid) for s, m in zip(some, merged)]
        tables = [evaluate_masks(some, out.attn, 'attn', grid), evaluate_masks(some, merged, 'merged', grid)]
        tables.append(evaluate_labels(some, refined, 'refined'))
        rows.append(pd.concat([t.set_index(['scene', 'frame']) for t in tables], axis=1))
        for s, m in zip(some, merged):
            truth = torch.from_numpy(s.segmentation)
            small = (
                torch.nn.functional.interpolate(truth[None, None].float(), grid, mode='nearest')[0, 0].flatten() == 0
            )
            best = int(torch.stack([small.logical_and(m.argmax(0) == k).sum() for k in range(len(m))]).argmax())
            right.append({rule: found == best for rule, found in backgrounds(m, grid).items()})
        i += len(x)
    table = pd.concat(rows)
    columns = [f'{m}_{k}' for k in ('attn', 'merged', 'refined') for m in SCORES]
    scores = dict(variant=name, seed=seed) | table[columns].mean().to_dict(), pd.DataFrame(right).mean().to_dict()
    write_json(kept, scores)
    return scores


def draw(names, ids):
    "Image, ground truth and merged slots of some validation scenes, one row for each variant; seed 0."
    every = validation_scenes()
    scenes = [every[i] for i in ids]
    rows = dict(image=[s.image for s in scenes])
    rows['ground truth'] = [overlay(s.image, s.segmentation) for s in scenes]
    for name in names:
        config = config_of(name, 0)
        run, net = load_run(config.run_dir), frozen_backbone(config)
        feats = extract(net, every, show_progress=False)
        x = run.normalizer(torch.stack([feats[i] for i in ids]))
        out = torch.cat([o.attn for o in outputs(run.model, x, 0, len(x))])
        labels = [
            hard_masks(merge_slots(m, f, net.grid), s.image.shape[:2], net.grid) for m, f, s in zip(out, x, scenes)
        ]
        rows[name] = [overlay(s.image, y, match_colors(s.segmentation, y)) for s, y in zip(scenes, labels)]
    return panels([x for row in rows.values() for x in row], cols=len(ids), size=1.5, rows=[fill(r, 18) for r in rows])


if __name__ == '__main__':
    scenes = validation_scenes()
    for name in VARIANTS:  # features are computed once, before processes ask for them at the same time
        net = frozen_backbone(config_of(name, 0))
        for data in (
            scenes,
            *(open_dataset(ROOT / 'data/movi_a_subset', s, progress=False) for s in ('train', 'test')),
        ):
            extract(net, data)
    jobs = [(name, seed) for name in VARIANTS for seed in SEEDS]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        done = [*tqdm(pool.map(score, *zip(*jobs)), 'runs', total=len(jobs), unit='run')]
    here = Path(__file__).parent
    pd.DataFrame([row for row, _ in done]).round(4).to_csv(here / 'ablation.csv', index=False)
    rules = pd.DataFrame([dict(variant=row['variant'], seed=row['seed']) | right for row, right in done])
    rules.round(4).to_csv(here / 'backgrounds.csv', index=False)
    shown = [
        'the default of version 0.1',
        'instance normalization instead of a space',
        'pca instead of lda, one round',
        'Xavier weights',
        'random slots',
        'default recipe',
        '15 slots',
    ]
    draw(shown, range(0, 40, 5)).savefig(here / 'masks.png', dpi=80)
    Image.open(here / 'masks.png').convert('RGB').quantize(255).save(here / 'masks.png')  # a sixth of the size
