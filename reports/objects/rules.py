"""Which rule finds the background? Rules compared on plain scenes, textured floors, close-ups and photographs.

The recipe is trained with three seeds on plain scenes and on textured ones, with the default rule in its rounds; its
merged masks are refined with each rule. The plain scenes are those of ablation.py. The textured ones are rendered by
`slotnb render --floor textured --seed 7 --samples 16`, 24 scenes of the split train and 16 of the split validation; a
close-up is an enlarged part of one of them. The photographs have no ground truth.
`python reports/objects/rules.py` writes rules.csv, rules_close_ups.png and rules_pictures_*.png beside this file;
finished runs are kept.
"""

from pathlib import Path
import matplotlib
import numpy as np
import pandas as pd
import skimage
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from tqdm import tqdm
from ablation import FOLDER, ROOT, SCORES, SEEDS, validation_scenes
from slotnb.data import Dataset, Entry
from slotnb.model import predict
from slotnb.features import extract
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_labels, evaluate_masks
from slotnb.model import build
from slotnb.normalizer import LinearSpace
from slotnb.plots import overlay, panels
from slotnb.refine import BACKGROUND_RULES, background_slot, merge_slots, refine_masks, segment_labels
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import make_optimizer, make_step, train_epoch

STEPS = 240  # of a round; the default recipe has 315
SEEDS_OF = dict(plain=SEEDS, textured=SEEDS, pictures=SEEDS[:1])
UNITED = 'united'  # all slots with 15 % of the border or more are one background
RULES = (*BACKGROUND_RULES, UNITED)


def unite(masks, grid, share=0.15):
    "Add the masks of all slots that own a share of the border to those of the most spread slot."
    owner, inner = masks.argmax(0).reshape(grid), torch.zeros(grid, dtype=torch.bool)
    inner[1:-1, 1:-1] = True
    border = torch.bincount(owner[~inner], minlength=len(masks)) / (~inner).sum()
    first, masks = background_slot(masks, grid), masks.clone()
    for k in set((border >= share).nonzero()[:, 0].tolist()) - {first}:
        masks[first] += masks[k]
        masks[k] = 0
    return masks


def refined(image, masks, grid, rule):
    if rule == UNITED:
        return refine_masks(image, unite(masks, grid), grid=grid)
    return refine_masks(image, masks, grid=grid, background=rule)


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
        else:
            raise ValueError(f'{scene.name} has no close-up with two objects')
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


def masks_of_run(name, raw, tests, seed, grid):
    "Train three rounds on a kind of data and keep slot attention's masks and the merged ones of its images."
    folder, labels = FOLDER / 'rules' / f'{name}-{seed}', None
    if not all((folder / f'{kind}.safetensors').is_file() for kind in tests):
        for i in range(3):
            space, model = train(raw, grid, seed, labels)
            if i < 2:
                attn = masks_of(space, model, raw, seed, merge=False)[0]
                labels = torch.stack([segment_labels(m, grid) for m in attn])
        folder.mkdir(parents=True, exist_ok=True)
        for kind, (_, feats) in tests.items():
            attn, merged = masks_of(space, model, feats, seed)
            save_tensors(folder / f'{kind}.safetensors', dict(attn=attn.half(), merged=merged.half()))
    kept = {kind: load_tensors(folder / f'{kind}.safetensors')[0] for kind in tests}
    return {kind: {k: v.float() for k, v in masks.items()} for kind, masks in kept.items()}


def true_slot(segmentation, masks, grid):
    "The slot that covers most of the floor."
    truth = torch.from_numpy(segmentation)[None, None].float()
    floor = torch.nn.functional.interpolate(truth, grid, mode='nearest').flatten() == 0
    return int(torch.bincount(masks.argmax(0)[floor], minlength=len(masks)).argmax())


def score(kind, images, masks, seed, grid):
    "A row for each rule: how often it names a slot, that of the default, the right one; scores after refinement."
    rows, done, slots = [], {}, {}
    if images[0].segmentation is not None:  # the same for all rules
        table = evaluate_masks(images, masks['attn'], 'attn', grid)
        slots = {f'{m}_attn': float(table[f'{m}_attn'].mean()) for m in SCORES}
    default = [background_slot(m, grid) for m in masks['merged']]
    for rule in RULES:
        named = [background_slot(m, grid, rule='spread' if rule == UNITED else rule) for m in masks['merged']]
        row = dict(data=kind, rule=rule, seed=seed, images=len(images)) | slots
        row['named'] = np.mean([k is not None for k in named])
        row['as_spread'] = np.mean([a == b for a, b in zip(named, default)])
        if images[0].segmentation is not None:
            true = [true_slot(s.segmentation, m, grid) for s, m in zip(images, masks['merged'])]
            row['right'] = np.mean([a == b for a, b in zip(named, true)])
            for i, (s, m) in enumerate(zip(images, masks['merged'])):  # rules that name the same slot refine alike
                key = i, named[i], rule == UNITED
                if key not in done:
                    done[key] = evaluate_labels([s], [refined(s.image, m, grid, rule)], 'refined').iloc[0]
            for m in SCORES:
                found = [done[i, k, rule == UNITED][f'{m}_refined'] for i, k in enumerate(named)]
                row[f'{m}_refined'] = float(np.mean(found))
        rows.append(row)
    return rows


def draw(images, masks, grid, rules, file):
    "Images and, for each rule, their refined segments; the background in grey."
    rows = {'image': [s.image for s in images]}
    for rule in rules:
        rows[rule] = [overlay(s.image, refined(s.image, m, grid, rule)) for s, m in zip(images, masks)]
    ims = [x for row in rows.values() for x in row]
    panels(ims, cols=len(images), size=1.2, rows=list(rows)).savefig(file, dpi=80)
    Image.open(file).convert('RGB').quantize(255).save(file)


if __name__ == '__main__':
    torch.set_num_threads(1)
    net, here, done = frozen_backbone(TrainConfig(device='cpu')), Path(__file__).parent, []
    data = load(net)
    for name, seed in tqdm([(n, s) for n in data for s in SEEDS_OF[n]], 'runs', unit='run'):
        raw, tests = data[name]
        masks = masks_of_run(name, raw, tests, seed, net.grid)
        for kind, (images, _) in tests.items():
            done += score(kind, images, masks[kind], seed, net.grid)
            if seed == 0 and kind in ('close-ups', 'pictures'):
                parts = [images] if kind == 'close-ups' else [images[:20], images[20:]]
                for i, some in enumerate(parts, 1):
                    at = 20 * (i - 1)
                    file = here / (f'rules_pictures_{i}.png' if kind == 'pictures' else 'rules_close_ups.png')
                    kept = masks[kind]['merged'][at : at + len(some)]
                    draw(some, kept, net.grid, [r for r in BACKGROUND_RULES if r != 'largest'], file)
    pd.DataFrame(done).round(4).to_csv(here / 'rules.csv', index=False)
