"""Measurements besides the scores of `slotnb.study`: one small table each.

Measures of the features before training, the effect of the mask temperature at test time, whether the entropy of a
mask predicts its error, and the overlap of every single object.
"""

import math
from collections.abc import Iterable
import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch.nn.functional import interpolate
from tqdm import tqdm
from slotnb.baselines import kmeans_masks
from slotnb.diagnostics import feature_stats, slot_stats
from slotnb.evaluate import load_run
from slotnb.model import predict
from slotnb.feature_measures import effective_rank, neighbour_cosine, spectrum
from slotnb.losses import fvu
from slotnb.metrics import best_overlap, evaluate_masks, hard_masks
from slotnb.normalizer import Normalizer
from slotnb.refine import refine_masks
from slotnb.runs.checkpoints import load_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.identity import read_about
from slotnb.runs.inputs import frozen_backbone, open_split, prepare
from slotnb.runs.verify import verified
from slotnb.study import Arm
from claims.protocol import QUESTIONS

EDGE = 4  # pixels from a border of the ground truth that count as edge, in images of 256 x 256


def _finished(plan, arms):
    "(arm, configuration) of every scored run of these arms."
    return [(arm, c) for arm in arms for c in plan.get(arm, []) if (c.run_dir / 'study.json').exists()]


def _test_masks(config, source):
    "Masks of the test scenes (s k n), and their grid (h, w)."
    masks = load_tensors(verified(config.run_dir / 'test_masks.safetensors'))[0][source].float()
    return masks, tuple(read_about(config.run_dir / 'config.json')['backbone']['grid'])


def feature_rows(
    arms: list[Arm],  # whose features differ
    base: dict,  # fields of `TrainConfig` that all arms share
    seeds: Iterable[int],  # of k-means
    show_progress: bool = True,
) -> pd.DataFrame:  # one row per arm
    """Measures of the features of the training scenes, without training.

    The measures of `feature_stats` are of the raw features; the others and the k-means masks are of
    instance-normalized ones.
    """
    rows = []
    for arm in tqdm(arms, 'features', unit='set', disable=not show_progress):
        config = TrainConfig(**(base | arm.settings))
        data = prepare(config, show_progress=False)
        raw, grid, scenes = data.train_and_val.load(), frozen_backbone(config).grid, list(data.scenes['train'])
        x = Normalizer('instance')(raw)
        scores = []
        for s in seeds:
            masks = [kmeans_masks(f, config.num_slots, s) for f in x]
            scores.append(evaluate_masks(scenes, masks, 'kmeans', grid).mean(numeric_only=True))
        rows.append(
            dict(arm=arm.name)
            | feature_stats(raw)
            | dict(effective_rank=effective_rank(spectrum(x)), neighbour_cosine=neighbour_cosine(x, grid))
            | {k: float(np.mean([m[k] for m in scores])) for k in ('fg_ari_kmeans', 'ari_kmeans', 'mbo_kmeans')}
        )
    return pd.DataFrame(rows)


def temperature_rows(
    plan: dict[str, list[TrainConfig]],  # of `plan_study`, run
    arms: tuple[str, ...] = ('mask1.0', 'base', 'mask0.25'),  # trained at different temperatures
    at: tuple[float, ...] = (2.0, 1.0, 0.5, 0.25, 0.1),  # mask temperatures at test time
) -> pd.DataFrame:  # one row per arm, seed and temperature
    "Scores of the trained models on the test scenes when the mask temperature is changed."
    rows = []
    for arm, c in _finished(plan, arms):
        run = load_run(c.run_dir)
        data, grid = prepare(c, show_progress=False), tuple(run.record['grid'])
        test = run.normalizer(data.test[:])
        for t in at:
            run.model.decoder.mask_temperature = t
            out = predict(run.model, test, c.seed)
            scores = evaluate_masks(data.scenes['test'], out.masks, 'masks', grid).mean(numeric_only=True)
            rows.append(
                dict(
                    arm=arm,
                    seed=c.seed,
                    trained_at=c.mask_temperature,
                    at=t,
                    fvu=fvu(out.recon, test).item(),
                    mask_max=slot_stats(out.slots, out.masks)['mask_max'],
                    fg_ari=scores.fg_ari_masks,
                    mbo=scores.mbo_masks,
                )
            )
    return pd.DataFrame(rows)


def regions(
    segmentation: np.ndarray,  # (h w) ints, 0 is the background
    materials: list[str],  # of object 1, 2, ...
) -> np.ndarray:  # (h w) of 'metal edge', 'metal inside', 'rubber edge', ... 'floor inside'
    "The surface that a pixel belongs to, and whether it is near a border of the ground truth."
    border = np.zeros(segmentation.shape, bool)
    border[:, 1:] |= segmentation[:, 1:] != segmentation[:, :-1]
    border[1:] |= segmentation[1:] != segmentation[:-1]
    near = ndimage.distance_transform_edt(~border) <= EDGE
    surface = np.array(['floor', *materials], dtype=object)[segmentation]
    return surface + np.where(near, ' edge', ' inside')


def pixel_errors(
    segmentation: np.ndarray,  # (h w) ints, 0 is the background
    masks: torch.Tensor,  # (k n) soft masks of one scene
    grid: tuple[int, int],  # (h, w) of the patches
) -> tuple[np.ndarray, np.ndarray]:  # (h w) entropy from 0 to 1, (h w) whether the pixel is wrong
    "A pixel is wrong if its slot mostly covers another segment of the ground truth."
    k, shape, n = len(masks), segmentation.shape, int(segmentation.max()) + 1
    soft = interpolate(masks.view(1, k, *grid), shape, mode='bilinear', align_corners=False)[0].clamp(min=0)
    soft = soft / soft.sum(0)
    entropy = (torch.special.entr(soft).sum(0) / math.log(k)).numpy()
    slot = hard_masks(masks, shape, grid)
    owner = np.bincount((slot * n + segmentation).ravel(), minlength=k * n).reshape(k, n).argmax(1)
    return entropy, owner[slot] != segmentation


def calibration_rows(
    plan: dict[str, list[TrainConfig]],  # of `plan_study`, run
    arms: tuple[str, ...] = ('base',),  # whose masks
    bins: int = 10,  # of entropy
) -> pd.DataFrame:  # one row per arm, seed, region and bin: pixels, wrong pixels, sum of the entropy
    "Entropy of the decoder's soft masks against their error (`pixel_errors`)."
    rows = []
    for arm, c in _finished(plan, arms):
        masks, grid = _test_masks(c, 'masks')
        tables = []
        for s, m in zip(open_split(c, 'test', False), masks):
            entropy, wrong = pixel_errors(s.segmentation, m, grid)
            columns = dict(
                region=regions(s.segmentation, s.materials),
                bin=np.minimum((entropy * bins).astype(int), bins - 1),
                wrong=wrong,
                entropy=entropy,
            )
            tables.append(pd.DataFrame({k: v.ravel() for k, v in columns.items()}))
        sums = dict(pixels=('wrong', 'size'), wrong=('wrong', 'sum'), entropy=('entropy', 'sum'))
        table = pd.concat(tables).groupby(['region', 'bin']).agg(**sums).reset_index()
        rows.append(table.assign(arm=arm, seed=c.seed))
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def scene_rows(
    plan: dict[str, list[TrainConfig]],  # of `plan_study`, run
    arms: tuple[str, ...] = ('base', *(a.name for a in QUESTIONS['slots'])),
) -> pd.DataFrame:  # one row per arm, seed and test scene
    "Scores of every scene, with its number of visible objects."
    rows = []
    for arm, c in _finished(plan, arms):
        visible = {s.name: len(np.setdiff1d(s.segmentation, [0])) for s in open_split(c, 'test', False)}
        table = pd.read_csv(verified(c.run_dir / 'test_scenes.csv'))
        rows.append(
            pd.DataFrame(
                dict(
                    arm=arm,
                    seed=c.seed,
                    num_slots=c.num_slots,
                    scene=table.scene,
                    objects=table.scene.map(visible),
                    fg_ari=table.fg_ari_attn,
                    ari=table.ari_attn,
                    mbo=table.mbo_attn,
                )
            )
        )
    return pd.concat(rows, ignore_index=True) if rows else pd.DataFrame()


def object_rows(
    plan: dict[str, list[TrainConfig]],  # of `plan_study`, run
    arms: tuple[str, ...] = ('base',),  # whose masks
) -> pd.DataFrame:  # one row per arm, seed and visible object of the test scenes
    "Material, shape, visible pixels and best overlap of every object, before and after refinement."
    rows = []
    for arm, c in _finished(plan, arms):
        masks, grid = _test_masks(c, 'attn')
        for s, m in zip(open_split(c, 'test', False), masks):
            coarse = best_overlap(s.segmentation, hard_masks(m, s.segmentation.shape, grid))
            fine = best_overlap(s.segmentation, refine_masks(s.image, m, grid=grid))
            for i in np.flatnonzero(~np.isnan(coarse)):
                o = s.instances[i]
                rows.append(
                    dict(
                        arm=arm,
                        seed=c.seed,
                        scene=s.name,
                        object=i + 1,
                        material=s.materials[i],
                        shape=o.get('shape_label', o.get('shape', '')),
                        color=o.get('color_label', ''),
                        pixels=int((s.segmentation == i + 1).sum()),
                        objects=len(s.instances),
                        overlap=coarse[i],
                        overlap_refined=fine[i],
                    )
                )
    return pd.DataFrame(rows)
