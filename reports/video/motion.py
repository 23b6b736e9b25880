"""What motion adds to slots where the camera stands still: the ground of a clip, and objects parted by their motion.

`python reports/video/motion.py` computes both for the 12 test clips, adds them to the masks of the default recipe,
trained with three seeds on the 60 committed training scenes, and scores four frames of each clip. It writes motion.csv
and motion.png beside this file; runs and features are kept in the cache. Nothing here reads the flow, the depth or the
objects of the renderer. The constants were set while looking at training clips.
"""

from pathlib import Path
from textwrap import fill
import numpy as np
import pandas as pd
import torch
from PIL import Image
from scipy.ndimage import binary_erosion, binary_fill_holes, binary_opening, gaussian_filter, label
from skimage.color import rgb2lab
from skimage.filters import sobel
from skimage.segmentation import watershed
from tqdm import tqdm
from slotnb.core import cache_dir
from slotnb.data import Dataset
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.mask_head.training import refined_labels
from slotnb.metrics import evaluate_scene
from slotnb.plots import match_colors, overlay, panels
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import fit
from slotnb.video.clips import clip_index

HERE, SEEDS = Path(__file__).parent, (0, 1, 2)
ROOT, STUDY = HERE.parent.parent, cache_dir() / 'motion'
FRAMES = (0, 6, 12, 18)  # of each clip that are scored
GROUND_L, DARK_L = 0.5, 0.4  # weights of lightness beside color: light varies on the ground, and shadows are darker
NEAR, FAR = 4.0, 8.0  # differences in CIELAB at which a pixel surely is ground, and at which it no longer is
LEAST = 12  # pixels of an object
SLOTS, MOTION, MEDIAN = 'slots, refined', 'parted by motion', 'differs from the median'
ADDED, CUT, PARTED = 'slots, lost objects added', 'slots, cut to what is no ground', 'slots, parted by motion'


def to_lab(images):
    "CIELAB of frames (t h w 3), without the finest noise."
    return np.stack([gaussian_filter(rgb2lab(x), (0.7, 0.7, 0)) for x in images])


def polynomials(height, width, degree):
    "Values of x^i y^j at each pixel, (h*w terms)."
    y, x = np.mgrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    return np.stack([(x**i * y**j).ravel() for i in range(degree + 1) for j in range(degree + 1 - i)], -1)


def fit_ground(lab, rng, tries=400):
    """The smooth color (h w 3) that most pixels of a clip have. RANSAC (Fischler and Bolles 1981) finds a plane in
    CIELAB; polynomials of rising degree then follow it with Tukey's weights. An object at rest is no part of it,
    unless it looks like the ground."""
    height, width = lab.shape[1:3]
    some, weights = lab[::3].reshape(-1, height * width, 3), np.array([GROUND_L, 1, 1])
    pixels, plane = some.reshape(-1, 3), polynomials(height, width, 1)
    rows = rng.choice(len(pixels), 6000, replace=False)
    x, y, best, most = plane[rows % (height * width)], pixels[rows], None, -1
    for _ in range(tries):
        few = rng.choice(len(rows), 4, replace=False)
        found = np.linalg.lstsq(x[few], y[few], rcond=None)[0]
        votes = (np.linalg.norm((y - x @ found) * weights, axis=1) < NEAR).sum()
        if votes > most:
            best, most = found, votes
    ground = plane @ best
    for degree in (1, 2, 2, 3, 3, 3, 3):
        terms = polynomials(height, width, degree)
        share = np.clip(1 - (np.linalg.norm((some - ground) * weights, axis=-1) / (2 * NEAR)) ** 2, 0, None) ** 2
        left = (terms * share.sum(0)[:, None]).T @ terms + 1e-5 * share.sum() * np.eye(terms.shape[1])
        ground = terms @ np.linalg.solve(left, terms.T @ (share[..., None] * some).sum(0))
    return ground.reshape(height, width, 3)


def differs(lab, ground):
    "Pixels (t h w) that are not the ground: holes filled, specks gone."
    d = lab - ground
    far = np.linalg.norm(np.where(d[..., :1] < 0, d * [DARK_L, 1, 1], d), axis=-1) > FAR
    return np.stack([_clean(x) for x in far])


def _clean(mask):
    parts, n = label(binary_fill_holes(binary_opening(mask, np.ones((2, 2)))))
    size = np.bincount(parts.ravel(), minlength=n + 1)
    size[0] = 0
    return (size >= LEAST)[parts]


def _moved(labels, k, step):
    "The mask of a track, moved by its last step."
    rows = np.argwhere(labels == k) + step
    rows = rows[((rows >= 0) & (rows < labels.shape)).all(1)]
    mask = np.zeros(labels.shape, bool)
    mask[tuple(rows.T)] = True
    return mask


def follow(masks, edges, start, order):
    """Labels (t h w) of the frames in an order, from labels of the first. A region that several tracks enter is parted
    between them by a watershed of the edges; a track that falls into several regions goes on in the largest."""
    found, steps, count = {order[0]: start}, {}, int(start.max())
    for a, b in zip(order, order[1:]):
        before, (regions, n) = found[a], label(masks[b])
        there = {k: _moved(before, k, steps.get(k, (0, 0))) for k in np.unique(before[before > 0])}
        claims = {c: [] for c in range(1, n + 1)}
        for k, mask in there.items():
            shared = np.bincount(regions[mask], minlength=n + 1)[1:]
            for c in np.flatnonzero((shared >= max(4, 0.15 * mask.sum())) & (shared >= 0.5 * shared.max(initial=0))):
                claims[c + 1].append(k)
        now = np.zeros_like(before)
        for c, tracks in claims.items():
            region = regions == c
            if not tracks:
                count += 1
                now[region] = count
                continue
            seeds = np.zeros_like(before)
            for k in tracks:
                inner = binary_erosion(there[k] & region, iterations=2)
                seeds[(inner if inner.sum() >= 4 else there[k] & region) & (seeds == 0)] = k
            now[region] = watershed(edges[b], seeds, mask=region)[region] if len(tracks) > 1 else tracks[0]
        for k in np.unique(now[now > 0]):
            if k in there:
                step = np.argwhere(now == k).mean(0) - np.argwhere(before == k).mean(0)
                steps[k] = np.round((step + steps.get(k, step)) / 2).astype(int)
        found[b] = now
    return np.stack([found[i] for i in sorted(found)])


def part_by_motion(lab, masks):
    "Labels of a clip, forwards, backwards and forwards again: objects that touch are parted as where they were apart."
    edges = [sum(sobel(x[..., i]) for i in range(3)) for x in lab]
    frames = [*range(len(masks))]
    labels = follow(masks, edges, label(masks[0])[0], frames)
    labels = follow(masks, edges, labels[-1], frames[::-1])
    return follow(masks, edges, labels[0], frames)


def add_lost(labels, mask, least=80):
    "Regions that are not the ground and that slots left to the background become segments."
    out, (regions, n) = labels.copy(), label(mask & (labels == 0))
    for c in range(1, n + 1):
        inner = binary_opening(regions == c, iterations=2)
        if inner.sum() >= least:
            out[inner] = out.max() + 1
    return out


def part(labels, tracks, share=0.2):
    "Cut a segment where two tracks hold this share of it or more."
    out = labels.copy()
    for k in np.unique(labels[labels > 0]):
        own = labels == k
        names, counts = np.unique(tracks[own], return_counts=True)
        for name in [n for n, c in zip(names, counts) if n and c >= share * own.sum()][1:]:
            out[own & (tracks == name)] = out.max() + 1
    return out


def from_motion(images, rng):
    "Of a clip: pixels that differ from its median, from its ground, and labels by motion."
    lab = to_lab(images)
    masks = differs(lab, fit_ground(lab, rng))
    return differs(lab, np.median(lab, 0)), masks, part_by_motion(lab, masks)


class Frames(Dataset):
    "Some frames of a dataset."

    def __init__(self, dataset, rows):
        super().__init__(dataset.root, [dataset.entries[i] for i in rows])
        self.kind, self.has_ground_truth, self.read = dataset.kind, dataset.has_ground_truth, dataset.read


def slot_labels(dataset, rows):
    "Refined labels of frames for each seed."
    found, frames = {}, Frames(dataset, rows)
    for seed in SEEDS:
        run = load_run(fit(TrainConfig(save_dir=str(STUDY / f'seed{seed}'), seed=seed, device='cpu')))
        feats = extract(frozen_backbone(run.config), frames)
        found[seed] = refined_labels(run, LazyFeatures(feats, lambda x: x * run.scale), frames)[1]
    return found


def score(arm, seed, clip, true, labels):
    covered = [((t > 0) & (x > 0)).sum() / max(1, ((t > 0) | (x > 0)).sum()) for t, x in zip(true, labels)]
    table = pd.DataFrame([evaluate_scene(t, x) for t, x in zip(true, labels)])[['fg_ari', 'ari', 'mbo']]
    return dict(arm=arm, seed=seed, clip=clip, foreground_iou=np.mean(covered)) | table.mean().to_dict()


def draw(shown):
    "Image, ground truth and labels of one frame of some clips, one row for each method."
    rows = {}
    for sample, found in shown:
        for name, x in found.items():
            colors = None if x is None else match_colors(sample.segmentation, x)
            rows.setdefault(name, []).append(sample.image if x is None else overlay(sample.image, x, colors))
    return panels(
        [x for row in rows.values() for x in row], cols=len(shown), size=1.3, rows=[fill(r, 14) for r in rows]
    )


if __name__ == '__main__':
    torch.set_num_threads(1)
    dataset = open_dataset(ROOT / 'data/movi_a_clips', 'test', max_frames=0, progress=False)
    clips = clip_index(dataset, check_sizes=False)
    rows = [c.rows[list(FRAMES)].tolist() for c in clips]
    slots = slot_labels(dataset, [i for some in rows for i in some])
    scores, shown = [], []
    for n, clip in enumerate(tqdm(clips, 'clips', unit='clip')):
        every = [dataset[i] for i in clip.rows.tolist()]
        true = [every[f].segmentation for f in FRAMES]
        moved = from_motion(np.stack([s.image for s in every]), np.random.default_rng(0))
        median, masks, tracks = ([x[f] for f in FRAMES] for x in moved)
        regions = [label(x)[0] for x in median], [label(x)[0] for x in masks]
        found = {MEDIAN: regions[0], 'differs from the ground': regions[1], MOTION: tracks}
        scores += [score(arm, 0, clip.name, true, x) for arm, x in found.items()]
        for seed, labels in slots.items():
            own = labels[n * len(FRAMES) : (n + 1) * len(FRAMES)]
            arms = {SLOTS: own, ADDED: [*map(add_lost, own, masks)], PARTED: [*map(part, own, tracks)]}
            arms[CUT] = [np.where(m, x, 0) for x, m in zip(own, masks)]
            scores += [score(arm, seed, clip.name, true, x) for arm, x in arms.items()]
            if seed == 0:
                rows_of = {'image': None, 'ground truth': true[2], MEDIAN: regions[0][2], MOTION: tracks[2]}
                shown.append((every[FRAMES[2]], rows_of | {SLOTS: own[2], ADDED: arms[ADDED][2]}))
    pd.DataFrame(scores).round(4).to_csv(HERE / 'motion.csv', index=False)
    draw(shown).savefig(file := HERE / 'motion.png', dpi=100)
    Image.open(file).convert('RGB').quantize(255).save(file)
