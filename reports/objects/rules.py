"""Which rule finds the background? Rules compared on plain scenes, textured floors, close-ups and photographs.

The recipe uses the rule twice: the background is one class of the space that the next round is trained in, and it stays
whole when masks are refined. So each rule trains its own models, three seeds each. The plain scenes are those of
ablation.py; the textured ones are rendered by `slotnb render --floor textured --seed 7 --samples 16`, 24 scenes of the
split train and 16 of validation; a close-up is a part of a textured scene. The pictures have no ground truth.
`python reports/objects/rules.py` writes rules.csv and rules_*.png beside this file; finished runs are kept.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
import matplotlib
import numpy as np
import pandas as pd
import skimage
import torch
from PIL import Image
from scipy import ndimage
from sklearn.datasets import load_sample_images
from tqdm import tqdm
from ablation import FOLDER, ROOT, SCORES, SEEDS, validation_scenes
from slotnb.core import read_json, write_json
from slotnb.data import Dataset, Entry
from slotnb.evaluate import predict
from slotnb.features import extract
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_labels, hard_masks
from slotnb.model import build
from slotnb.normalizer import LinearSpace
from slotnb.plots import overlay, panels
from slotnb.refine import guided_filter, merge_slots, split_components
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import make_optimizer, make_step, train_epoch

STEPS = 240  # of a round
RUNS = dict(plain=3, textured=3, pictures=1)  # seeds for each kind of data


class Rule(NamedTuple):
    "Which slots are background, and what follows from it."

    pick: Callable  # of the table of `measures`; the slots, the background itself first
    united: bool = False  # all slots that were picked are one segment
    merged: bool = False  # slots that hold the same thing are merged before the space of the next round is fitted


def measures(masks, grid):
    "Share of the patches, share of the border's patches, and variance of the positions of each slot."
    h, w = grid
    owner = masks.argmax(0).reshape(grid)
    border = torch.cat([owner[0], owner[-1], owner[1:-1, 0], owner[1:-1, -1]])
    y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing='ij')
    rows = []
    for k in range(len(masks)):
        own = owner == k
        spread = sum(v[own].var(correction=0).item() for v in (y, x)) if own.any() else 0.0
        rows.append(dict(share=own.float().mean().item(), border=(border == k).float().mean().item(), spread=spread))
    return pd.DataFrame(rows)


def most_spread(m):
    return [int(m.spread.where(m.share >= 0.04, -1).idxmax())]


def most_border(m):
    return [int(m.border.idxmax())]


def largest(m):
    return [int(m.share.idxmax())]


def border_times_spread(m):
    return [int((m.border * m.spread).idxmax())]


def agreement(m):
    found = [rule(m) for rule in (most_spread, most_border, largest)]
    return found[0] if found[0] == found[1] == found[2] else []


def at_border(m):
    first = most_spread(m)
    return first + [int(k) for k in m.index[m.border >= 0.15] if k not in first]


RULES = {
    'spread': Rule(most_spread),
    'each whole': Rule(at_border),
    'none': Rule(lambda m: []),
    'agreement': Rule(agreement),
    'united': Rule(at_border, united=True),
    'spread, merged rounds': Rule(most_spread, merged=True),
    'border': Rule(most_border),
}
PICKS = dict(
    spread=most_spread, border=most_border, largest=largest, border_times_spread=border_times_spread
)  # single slots


def unite(masks, whole):
    "Add the masks of the slots in `whole` to the first of them."
    masks = masks.clone()
    for k in whole[1:]:
        masks[whole[0]] += masks[k]
        masks[k] = 0
    return masks


def apply(rule, masks, grid):
    "Masks in which united slots are one, and the slots that are not split."
    whole = rule.pick(measures(masks, grid))
    return (unite(masks, whole), whole[:1]) if rule.united else (masks, whole)


def segments(rule, masks, grid, min_patches=4):
    "As `slotnb.refine.segment_labels`, with the rule of this page."
    masks, whole = apply(rule, masks, grid)
    owner, labels = masks.argmax(0).reshape(grid).numpy(), np.full(grid, -1)
    for i, k in enumerate(whole):
        labels[owner == k] = i
    count = max(len(whole) - 1, 0)
    for k in set(np.unique(owner)) - set(whole):
        pieces, n = ndimage.label(owner == k)
        for piece in range(1, n + 1):
            if (pieces == piece).sum() >= min_patches:
                count += 1
                labels[pieces == piece] = count
    return torch.from_numpy(labels.ravel())


def refined_slots(image, masks, grid, sharpen=3.0):
    "The slot of each pixel: `slotnb.refine.refine_masks` before components are split."
    used = masks.sum(1) > 0
    sharp = masks[used] ** sharpen
    sharp = (sharp / sharp.sum(0)).reshape(1, -1, *grid)
    large = torch.nn.functional.interpolate(sharp, image.shape[:2], mode='bilinear', align_corners=False)[0].numpy()
    return used.nonzero()[:, 0].numpy()[guided_filter(image / 255, large).argmax(0)]


def split(owner, whole, min_pixels=64):
    "Components of all slots but those in `whole`, of which the first becomes label 0."
    if not whole:
        return split_components(owner, min_pixels) + 1
    pieces = split_components(owner, min_pixels, whole[0])
    for k in whole[1:]:  # one label for all large pieces of a further slot that is whole
        mine = [i for i in np.unique(pieces[owner == k]) if (owner[pieces == i] == k).mean() > 0.5]
        if mine:
            pieces[np.isin(pieces, mine)] = mine[0]
    return pieces


# --- data


class CloseUps(Dataset):
    "A square part of each scene, enlarged to the scene's size. No object is cut to less than 64 pixels."

    kind = 'close-ups'

    def __init__(self, scenes):
        self.base = scenes
        super().__init__(scenes.root, [Entry(e.name, 0, i) for i, e in enumerate(scenes.entries)])

    def read(self, entry):
        scene, rng = self.base[entry.where], np.random.default_rng(entry.where)
        size = len(scene.image)
        for _ in range(1000):
            side = int(rng.integers(size // 3, size // 2 + 1))
            top, left = rng.integers(0, size - side + 1, 2)
            part = np.s_[top : top + side, left : left + side]
            mask = Image.fromarray(scene.segmentation[part].astype(np.uint8)).resize((size, size), 0)
            mask = np.asarray(mask).astype(np.int64)
            pixels = np.bincount(mask.ravel())
            if (pixels[1:] > 0).sum() >= 2 and pixels[pixels > 0].min() >= 64:
                break
        image = Image.fromarray(scene.image[part]).resize((size, size), Image.Resampling.BICUBIC)
        return scene._replace(image=np.asarray(image), segmentation=mask)


def textured(split, scenes):
    from slotnb.scenes.render import render

    render(FOLDER / 'textured', scenes, split=split, seed=7, samples=16, floor='textured')
    return open_dataset(FOLDER / 'textured', split, progress=False)


def pictures():
    "Two square views of 20 pictures that come with scikit-image, scikit-learn and matplotlib, written as files."
    folder = FOLDER / 'pictures'
    if (folder / 'done').is_file():
        return open_dataset(folder / 'views', None, progress=False)
    (folder / 'views').mkdir(parents=True, exist_ok=True)
    names = (
        'astronaut.png camera.png chelsea.png coffee.png coins.png motorcycle_left.png rocket.jpg clock_motion.png '
        'hubble_deep_field.jpg moon.png cell.png retina.jpg ihc.png horse.png page.png gravel.png brick.png'
    )
    found = {Path(f).stem: Image.open(Path(skimage.__file__).parent / 'data' / f) for f in names.split()}
    samples = load_sample_images()
    found |= {Path(f).stem: Image.fromarray(x) for f, x in zip(samples.filenames, samples.images)}
    found['hopper'] = Image.open(Path(matplotlib.get_data_path()) / 'sample_data/grace_hopper.jpg')
    rng = np.random.default_rng(0)
    for name, picture in found.items():
        for view, share in enumerate((1.0, rng.uniform(0.5, 0.9))):
            side = int(min(picture.size) * share)
            left, top = ((length - side) * (0.5 if view == 0 else rng.random()) for length in picture.size)
            square = picture.convert('RGB').crop((left, top, left + side, top + side)).resize((256, 256))
            square.save(folder / 'views' / f'{name}_{view}.png')
    (folder / 'done').touch()
    return open_dataset(folder / 'views', None, progress=False)


def load(net):
    "Training features and {name: (images, features)} for each kind of data."

    def feats(data):
        return torch.stack([x.float() for x in extract(net, data, show_progress=False)])

    committed = open_dataset(ROOT / 'data/movi_a_subset', 'train', progress=False)
    plain, tex = validation_scenes(), {s: textured(s, n) for s, n in (('train', 24), ('validation', 16))}
    near = {s: CloseUps(d) for s, d in tex.items()}
    photos = pictures()
    shown = feats(photos)
    return dict(
        plain=(feats(committed), dict(plain=([*plain], feats(plain)))),
        textured=(
            torch.cat([feats(tex['train']), feats(near['train'])]),
            {
                'textured': ([*tex['validation']], feats(tex['validation'])),
                'close-ups': ([*near['validation']], feats(near['validation'])),
            },
        ),
        pictures=(shown, dict(pictures=([*photos], shown))),
    )


# --- runs


def train(raw, grid, seed, labels):
    "One round: fit the space, train in it. Returns the normalized features and the model."
    per_epoch = -(-len(raw) // 8)
    epochs = round(STEPS / per_epoch)
    config = TrainConfig(seed=seed, device='cpu', num_epochs=epochs, warmup_epochs=max(1, round(epochs * 7 / 45)))
    space = LinearSpace('lda', raw.shape[-1], config.space_dim).fit(raw, labels)
    feats, model = space(raw), build(config, space.out_dim, grid)
    opt = make_optimizer(config, model.parameters())
    step, _ = make_step(config, model, opt)
    for epoch in range(epochs):
        train_epoch(step, model, opt, feats, config, epoch)
    return space, model.eval()


def masks_of(space, model, raw, seed, merge=True):
    "Masks of slot attention and merged masks, each (s k n)."
    with torch.no_grad():
        feats = space(raw)
        attn = predict(model, feats, seed).attn
        return attn, *([torch.stack([merge_slots(m, x, model.grid) for m, x in zip(attn, feats)])] if merge else [])


def first_round(name, raw, grid, seed):
    "The round in the space of principal components, which all rules share."
    file = FOLDER / 'rules' / f'{name}-first-{seed}.safetensors'
    space, model = LinearSpace('lda', raw.shape[-1], 32), build(TrainConfig(seed=seed), 32, grid)
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        space, model = train(raw, grid, seed, None)
        parts = dict(space=space, model=model)
        save_tensors(file, {f'{p}.{k}': v for p, m in parts.items() for k, v in m.state_dict().items()})
    for prefix, part in (('space.', space), ('model.', model)):
        tensors = load_tensors(file)[0]
        part.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    space.fitted = True
    return space, model.eval()


def run(name, raw, tests, rule_name, seed, grid):
    "Train the rounds of a rule on a kind of data and write scores and masks of its validation images."
    folder = FOLDER / 'rules' / f'{name}-{rule_name.replace(", ", "-").replace(" ", "-")}-{seed}'
    if (folder / 'scores.json').is_file():
        return read_json(folder / 'scores.json')
    rule, (space, model), rows = RULES[rule_name], first_round(name, raw, grid, seed), []
    for _ in range(2):
        masks = masks_of(space, model, raw, seed, rule.merged)[-1]
        labels = torch.stack([segments(rule, m, grid) for m in masks])
        space, model = train(raw, grid, seed, labels)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, (images, feats) in tests.items():
        attn, merged = masks_of(space, model, feats, seed)
        save_tensors(folder / f'{kind}.safetensors', dict(attn=attn.half(), merged=merged.half()))
        if images[0].segmentation is not None:
            rows += score(kind, rule_name, seed, images, attn, merged, grid)
    write_json(folder / 'scores.json', rows)
    return rows


def score(kind, name, seed, images, attn, merged, grid):
    "A row for each rule that refines the masks: its own and, for the default rule, all others."
    sizes = images[0].segmentation.shape
    tables, rows = {}, []
    slots = evaluate_labels(images, [hard_masks(m, sizes, grid) for m in attn], 'attn')
    owners = [refined_slots(s.image, m, grid) for s, m in zip(images, merged)]
    for used in RULES if name == 'spread' else [name]:
        rule = RULES[used]
        found = [apply(rule, m, grid) for m in merged]
        table = evaluate_labels(images, [hard_masks(m, sizes, grid) for m, _ in found], 'merged')
        labels = []
        for owner, m, (_, whole) in zip(owners, merged, found):
            picked = rule.pick(measures(m, grid))
            owner = np.where(np.isin(owner, picked), picked[0], owner) if rule.united else owner
            labels.append(split(owner, whole))
        last = evaluate_labels(images, labels, 'refined')
        row = dict(data=kind, trained_with=name, refined_with=used, seed=seed)
        for t, source in ((slots, 'attn'), (table, 'merged'), (last, 'refined')):
            row |= {f'{m}_{source}': float(t[f'{m}_{source}'].mean()) for m in SCORES}
        row['backgrounds'] = float(np.mean([len(rule.pick(measures(m, grid))) for m in merged]))
        rows.append(row)
    return rows


def main():
    torch.set_num_threads(1)
    net = frozen_backbone(TrainConfig(device='cpu'))
    every, done = load(net), []
    jobs = [(r, s, name) for name, n in RUNS.items() for r in RULES for s in SEEDS[:n]]
    for rule, seed, name in tqdm(jobs, 'runs', unit='run'):
        done += run(name, *every[name], rule, seed, net.grid)
    return done


if __name__ == '__main__':
    pd.DataFrame(main()).round(4).to_csv(Path(__file__).parent / 'rules.csv', index=False)
