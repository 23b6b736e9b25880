"""Mask heads trained on a run's own masks: what they add, paired by seed.

`python reports/objects/mask_heads.py` trains runs of the default recipe and heads on their masks of the 60 committed
training scenes, and scores both on the 40 validation scenes of `ablation.py`; with the argument `test` also on the
committed test scenes. It writes mask_heads.csv, mask_heads_causes.csv and mask_heads_test_*.png beside this file;
finished runs and heads are kept.
"""

import sys
from pathlib import Path
from textwrap import fill
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm
from ablation import FOLDER, SCORES, features_of, validation_scenes
from colors import COMMITTED
from finer import CAUSES
from slotnb.evaluate import load_run
from slotnb.formats.detect import open_dataset
from slotnb.mask_head.head import MaskHead
from slotnb.mask_head.training import refined_labels
from slotnb.metrics import evaluate_scene
from slotnb.plots import match_colors, overlay, panels
from slotnb.runs.inputs import frozen_backbone
from slotnb.study import Arm, plan_study
from slotnb.train import fit

HERE, STUDY, SEEDS = Path(__file__).parent, FOLDER / 'mask_heads', (0, 1, 2)
BASE = 'default recipe'
REFINED, HEAD, UNPASTED = 'refined masks', 'mask head', 'without pasted objects'


def scenes_of(run, split):
    if split == 'validation':
        return validation_scenes()
    return open_dataset(run.config.data_dir, split, progress=False)


def labels_of(run, split):
    "The run's refined labels of a split; kept."
    file = run.folder / f'own-{split}.npz'
    if not file.is_file():
        scenes = scenes_of(run, split)
        feats = features_of(run, frozen_backbone(run.config), scenes)
        np.savez_compressed(file, labels=np.stack(refined_labels(run, feats, scenes, False)[1]).astype(np.uint8))
    return list(np.load(file)['labels'].astype(int))


def head_of(run, arm):
    "The head of an arm; kept."
    file = run.folder / f'{arm.replace(" ", "-")}.safetensors'
    if not file.is_file():
        images, labels = [s.image for s in scenes_of(run, 'train')], labels_of(run, 'train')
        share = dict(paste_share=0.0) if arm == UNPASTED else {}
        MaskHead.train(images, labels, run.config.seed, **share).save(file)
    return MaskHead.load(file)


def found_by(run, arm, split):
    "Labels of a split; kept."
    own = labels_of(run, split)
    if arm == REFINED:
        return own
    file = run.folder / f'{arm.replace(" ", "-")}-{split}.npz'
    if not file.is_file():
        head = head_of(run, arm)
        labels = [head.labels(s.image, x == 0) for s, x in zip(scenes_of(run, split), own)]
        np.savez_compressed(file, labels=np.stack(labels).astype(np.uint8))
    return list(np.load(file)['labels'].astype(int))


def draw(run, ids):
    "Image, ground truth, the run's refined masks and its head's segments of some test scenes."
    every = open_dataset(COMMITTED, 'test', progress=False)
    scenes = [every[i] for i in ids]
    rows = {'image': [s.image for s in scenes], 'ground truth': [overlay(s.image, s.segmentation) for s in scenes]}
    for arm in (REFINED, HEAD):
        labels = [found_by(run, arm, 'test')[i] for i in ids]
        rows[arm] = [overlay(s.image, x, match_colors(s.segmentation, x)) for s, x in zip(scenes, labels)]
    titles = [s.name.removeprefix('scene_') for s in scenes]
    return panels([x for row in rows.values() for x in row], titles, len(ids), 1.3, [fill(r, 12) for r in rows])


if __name__ == '__main__':
    torch.set_num_threads(1)
    configs = plan_study(
        [Arm(BASE, 'the default of `slotnb train`')], SEEDS, STUDY, data_dir=str(COMMITTED), device='cpu'
    )[BASE]
    splits = ['validation', 'test'] if 'test' in sys.argv[1:] else ['validation']
    jobs = [(arm, split) for split in splits for arm in (REFINED, HEAD)]
    jobs.append((UNPASTED, 'validation'))
    rows, causes = [], []
    for (arm, split), config in tqdm([(job, c) for job in jobs for c in configs], 'heads', unit='head'):
        run = load_run(fit(config, show_progress=False))
        scenes, labels = scenes_of(run, split), found_by(run, arm, split)
        about = dict(arm=arm, seed=config.seed, split=split)
        for cause, change in CAUSES.items():
            changed = [evaluate_scene(s.segmentation, change(s.segmentation, y)) for s, y in zip(scenes, labels)]
            causes.append(about | dict(cause=cause) | pd.DataFrame(changed)[[*SCORES]].mean().to_dict())
        rows.append({k: v for k, v in causes[-len(CAUSES)].items() if k != 'cause'})
        pd.DataFrame(rows).round(4).to_csv(HERE / 'mask_heads.csv', index=False)
        pd.DataFrame(causes).round(4).to_csv(HERE / 'mask_heads_causes.csv', index=False)
    if 'test' in splits:
        for i, ids in enumerate((range(12), range(12, 24)), 1):
            file = HERE / f'mask_heads_test_{i}.png'
            draw(load_run(configs[0].run_dir), ids).savefig(file, dpi=100)
            Image.open(file).convert('RGB').quantize(255).save(file)
