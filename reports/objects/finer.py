"""Masks beyond the patch grid: shifted copies, a watershed, patch colors, and where the rest of the score is lost.

`python reports/objects/finer.py` trains the default recipe, once as it is and once with the colors of the patches,
three seeds each, and scores both on the 40 validation scenes of `ablation.py`. It writes finer.csv, finer_causes.csv
and finer_masks.png beside this file; finished runs are kept. `python reports/objects/finer.py test` scores the chosen
setting on the test scenes and writes finer_test.csv.
"""

import sys
from pathlib import Path
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from skimage.color import rgb2lab
from tqdm import tqdm
from ablation import FOLDER, ROOT, validation_scenes
from slotnb.finer_grid import ShiftedBackbone, fine_attention
from slotnb.core import generator
from slotnb.evaluate import load_run
from slotnb.model import predict
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.metrics import contingency, evaluate_scene, hard_masks
from slotnb.model import build
from slotnb.plots import match_colors, overlay, panels
from slotnb.refine import merge_slots, refine_masks
from slotnb.runs.checkpoints import checkpoint_path, load_into, load_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import fit_normalizer, frozen_backbone, prepare
from slotnb.train import _train_round, model_segments

HERE, SEEDS = Path(__file__).parent, (0, 1, 2)
SCORES = ('fg_ari', 'ari', 'mbo')
CPU = torch.device('cpu')


def patch_colors(images, net, factor=1):
    "Mean Lab color / 100 of each patch, (s n 3); with `factor` 2 of the patches of a `ShiftedBackbone`."
    (h, w), p, out = net.resolution, net.spec.patch_size, []
    starts = [p // 2 + int(np.floor(p * ((i + 0.5) / factor - 0.5))) for i in range(factor)]
    for image in images:
        lab = torch.tensor(rgb2lab(image) / 100).float().permute(2, 0, 1)[None]
        lab = F.pad(F.interpolate(lab, (h, w), mode='bilinear', align_corners=False), (p // 2,) * 4, mode='reflect')
        means = torch.stack([F.avg_pool2d(lab[0, :, y : y + h, x : x + w], p) for y in starts for x in starts])
        out.append(means.unflatten(0, (factor, factor)).permute(3, 0, 4, 1, 2).flatten(0, 3))
    return torch.stack(out)


def with_colors(feats, scenes, net, factor=1):
    return torch.cat([feats, patch_colors([s.image for s in scenes], net, factor)], -1)


def trained(name, seed):
    "A run of the default recipe; for the name 'colors', its features are patch tokens and patch colors."
    config = TrainConfig(
        data_dir=str(ROOT / 'data/movi_a_subset'),
        save_dir=str(FOLDER / f'finer-{name}-seed{seed}'),
        seed=seed,
        device='cpu',
    )
    if not checkpoint_path(config.run_dir).is_file():
        data, net, segments = prepare(config, False), frozen_backbone(config), None
        if name == 'colors':
            train = with_colors(data.train_and_val.load(), data.scenes['train'], net)
            test = with_colors(data.test.load(), data.scenes['test'], net)
            parts = {k: LazyFeatures(train, None, getattr(data, k).index) for k in ('train', 'val', 'train_and_val')}
            data = data._replace(**parts, test=LazyFeatures(test), record=data.record | dict(dim=train.shape[-1]))
        for part in config.round_configs:
            norm = fit_normalizer(part, data, CPU, segments)
            model = _train_round(part, data, norm, False)
            if part is not config:
                load_into(model, load_tensors(checkpoint_path(part.run_dir))[0], 'model', part.run_dir)
                segments = model_segments(model, LazyFeatures(data.train, norm), seed)
    return load_run(config.run_dir)


def masks_of(run, scenes, grid, seed):
    "Merged slots: on the grid of training ('32'), on the fine one ('64'), or of the model run on all fine tokens."
    net = frozen_backbone(run.config)
    factor = 1 if grid == '32' else 2
    net = net if factor == 1 else ShiftedBackbone(net, 2)
    feats, noise, merged, attention = extract(net, scenes, show_progress=False), generator(seed, 'evaluation'), [], []
    model = run.model
    if grid == '64, slots of all fine tokens':
        model = build(run.config, run.normalizer.out_dim, net.grid).eval()
        model.load_state_dict(run.model.state_dict())
    plain = getattr(net, 'backbone', net)
    for s, x in zip(scenes, feats):
        x = x[None] if len(run.normalizer.mean) == x.shape[-1] else with_colors(x[None], [s], plain, factor)
        x = run.normalizer(x)
        with torch.no_grad():
            attn = fine_attention(model, x, 2, noise)[0] if grid == '64' else predict(model, x, seed).attn
        attention.append(attn[0])
        merged.append(merge_slots(attn[0], x[0], net.grid))
    return attention, merged, net.grid


def rate(scenes, labels):
    return pd.DataFrame([evaluate_scene(s.segmentation, x) for s, x in zip(scenes, labels)])[[*SCORES]].mean().to_dict()


def joined(true, labels):
    "Each segment becomes part of the true segment that it has most pixels of."
    return contingency(true, labels).argmax(0)[labels]


def parted(true, labels, of_background):
    "Objects of which a segment holds more than half, beside another one (or in the background's), are cut out."
    table, out, count = contingency(true, labels), labels.copy(), labels.max()
    held = (table > 0.5 * table.sum(1, keepdims=True)) & (table > 0)
    background = table[0].argmax()
    for k in range(table.shape[1]):
        if (k == background) == of_background:
            for i in np.flatnonzero(held[1:, k])[0 if of_background else 1 :] + 1:
                count += 1
                out[(labels == k) & (true == i)] = count
    return out


def edged(true, labels, width):
    "Pixels within `width` of a true boundary go to the segment that has most of the rest of their true segment."
    out, table = labels.copy(), contingency(true, labels)
    for i in np.unique(true):
        own = true == i
        core = own & (ndimage.distance_transform_edt(own) > width)
        out[own & ~core] = np.bincount(labels[core]).argmax() if core.any() else table[i].argmax()
    return out


CAUSES = {
    'as they are': lambda t, x: x,
    'parts of one object joined': joined,
    'merged objects parted': lambda t, x: parted(t, x, False),
    'objects in the background cut out': lambda t, x: parted(t, x, True),
    'right within 2 pixels of a boundary': lambda t, x: edged(t, x, 2),
    'right within 4 pixels of a boundary': lambda t, x: edged(t, x, 4),
    'joined, parted and cut out': lambda t, x: joined(t, parted(t, parted(t, x, False), True)),
}


def study(scenes, names, grids):
    "Scores, scores with one cause of loss removed by the ground truth, and labels for the picture."
    rows, causes, labels, images = [], [], {}, [*scenes]
    for name, seed, grid in tqdm([(n, s, g) for n in names for s in SEEDS for g in grids], 'scores', unit='run'):
        if name == 'colors' and grid.startswith('64,'):
            continue
        attn, merged, size = masks_of(trained(name, seed), scenes, grid, seed)
        found = {
            k: [hard_masks(m, s.image.shape[:2], size) for s, m in zip(images, x)]
            for k, x in (('slots', attn), ('merged', merged))
        }
        for step, width in (('guided filter', 0), ('watershed', 4)):
            found[step] = [refine_masks(s.image, m, grid=size, watershed=width) for s, m in zip(images, merged)]
        about = dict(features=name, grid=grid, seed=seed)
        rows += [about | dict(masks=step) | rate(images, x) for step, x in found.items()]
        if (name, grid) == ('default', '32') or (name, grid) == ('colors', '64'):
            for cause, change in CAUSES.items():
                step = 'guided filter' if name == 'default' else 'watershed'
                changed = [change(s.segmentation, x) for s, x in zip(images, found[step])]
                causes.append(about | dict(masks=step, cause=cause) | rate(images, changed))
        if not seed:
            labels |= {(name, grid, step): x for step, x in found.items()}
    return pd.DataFrame(rows), pd.DataFrame(causes), labels


def draw(scenes, labels, ids):
    "Image, ground truth and masks of some scenes, one row for each kind of masks."
    images = [scenes[i] for i in ids]
    rows = dict(image=[s.image for s in images], truth=[overlay(s.image, s.segmentation) for s in images])
    shown = {
        'slots, merged': ('default', '32', 'merged'),
        'refined': ('default', '32', 'guided filter'),
        '64x64, merged': ('default', '64', 'merged'),
        '64x64, watershed': ('default', '64', 'watershed'),
        'the same, colors': ('colors', '64', 'watershed'),
    }
    for name, key in shown.items():
        found = [labels[key][i] for i in ids]
        rows[name] = [overlay(s.image, x, match_colors(s.segmentation, x)) for s, x in zip(images, found)]
    return panels([x for row in rows.values() for x in row], cols=len(ids), size=1.6, rows=[*rows])


if __name__ == '__main__':
    torch.set_num_threads(1)
    if sys.argv[1:] == ['test']:
        scenes = open_dataset(ROOT / 'data/movi_a_subset', 'test', progress=False)
        table, _, _ = study(scenes, ['default'], ['32', '64'])
        table.round(4).to_csv(HERE / 'finer_test.csv', index=False)
    else:
        scenes = validation_scenes()
        table, causes, labels = study(scenes, ['default', 'colors'], ['32', '64', '64, slots of all fine tokens'])
        table.round(4).to_csv(HERE / 'finer.csv', index=False)
        causes.round(4).to_csv(HERE / 'finer_causes.csv', index=False)
        draw(scenes, labels, range(2, 40, 5)).savefig(HERE / 'finer_masks.png', dpi=80)
        Image.open(HERE / 'finer_masks.png').convert('RGB').quantize(255).save(HERE / 'finer_masks.png')
