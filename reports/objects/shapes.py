"""Pictures that are not square: stretch, letterbox and crop, each trained and scored on the same pictures.

Scenes are cut to 3:2 or 2:3 by a seeded rule, masks included: the training scenes, and the 40 validation scenes of
`ablation.py`; the test scenes are not used. `python reports/objects/shapes.py` trains the default recipe with each way,
three seeds, and scores what `Run.segment` returns. It writes shapes.csv and shapes.png beside this file; finished runs
are kept.
"""

from pathlib import Path
import numpy as np
import pandas as pd
import torch
from ablation import FOLDER, ROOT, SCORES, SEEDS, validation_scenes
from PIL import Image
from tqdm import tqdm
from slotnb.core import generator
from slotnb.evaluate import load_run
from slotnb.features import extract
from slotnb.formats.detect import open_dataset
from slotnb.geometry import RESIZES, middle_square
from slotnb.metrics import evaluate_scene
from slotnb.plots import match_colors, overlay, panels
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone, open_split
from slotnb.train import fit

HERE, DATA = Path(__file__).parent, FOLDER / 'shapes'


def cut(sample):
    "A scene cut to 3:2 or 2:3, at a place that depends on its name alone."
    side = min(sample.image.shape[:2])
    short, draw = round(side * 2 / 3), generator('shapes', sample.name)
    start = int(torch.randint(side - short + 1, (), generator=draw))
    part = slice(start, start + short)
    part = (part, slice(0, side)) if torch.rand((), generator=draw) < 0.5 else (slice(0, side), part)
    return sample._replace(image=sample.image[part], segmentation=sample.segmentation[part])


def write_shapes():
    "The cut scenes as a folder of images with masks: the training scenes, and the validation scenes as test."
    if DATA.is_dir():
        return
    parts = dict(train=open_dataset(ROOT / 'data/movi_a_subset', 'train', progress=False), test=validation_scenes())
    new = DATA.with_name('shapes.new')
    for split, scenes in parts.items():
        for kind in ('images', 'masks'):
            (new / split / kind).mkdir(parents=True, exist_ok=True)
        for s in map(cut, scenes):
            Image.fromarray(s.image).save(new / split / 'images' / f'{s.name}.png')
            Image.fromarray(s.segmentation.astype(np.uint8)).save(new / split / 'masks' / f'{s.name}.png')
    new.rename(DATA)


def trained(resize, seed):
    folder = FOLDER / f'shapes-{resize}-seed{seed}'
    config = TrainConfig(data_dir=str(DATA), save_dir=str(folder), resize=resize, seed=seed, device='cpu')
    return load_run(fit(config, show_progress=False))


def score(scenes, results):
    "Mean scores over the whole picture, and over the middle square, which is all that a crop sees."
    rows = dict(picture=[], square=[])
    for s, found in zip(scenes, results):
        part = middle_square(s.image.shape[:2])
        rows['picture'].append(evaluate_scene(s.segmentation, found.labels))
        rows['square'].append(evaluate_scene(s.segmentation[part], found.labels[part]))
    return {area: pd.DataFrame(table)[[*SCORES]].mean().to_dict() for area, table in rows.items()}


def draw(scenes, labels):
    "Pictures, ground truth and the segments of each way, seed 0."
    rows = dict(image=[s.image for s in scenes])
    rows['ground truth'] = [overlay(s.image, s.segmentation) for s in scenes]
    for resize in RESIZES:
        found = labels[resize]
        rows[resize] = [overlay(s.image, y, match_colors(s.segmentation, y)) for s, y in zip(scenes, found)]
    return panels([x for row in rows.values() for x in row], cols=len(scenes), size=1.5, rows=[*rows])


if __name__ == '__main__':
    torch.set_num_threads(1)
    write_shapes()
    test, table, shown = [*open_dataset(DATA, 'test', progress=False)], [], {}
    ids = range(0, len(test), 5)
    for resize, seed in tqdm([(r, s) for r in RESIZES for s in SEEDS], 'runs', unit='run'):
        run = trained(resize, seed)
        feats = extract(frozen_backbone(run.config), open_split(run.config, 'test', False), show_progress=False)
        for refine in (False, True):
            segmenter = run.segmenter(device='cpu', refine=refine)
            results = [segmenter._segment(s, x) for s, x in zip(test, feats)]  # `run.segment`, with known features
            for area, scores in score(test, results).items():
                masks = 'refined' if refine else 'merged'
                table.append(dict(resize=resize, seed=seed, masks=masks, area=area) | scores)
            if refine and seed == 0:
                shown[resize] = [results[i].labels for i in ids]
    pd.DataFrame(table).round(4).to_csv(HERE / 'shapes.csv', index=False)
    draw([test[i] for i in ids], shown).savefig(HERE / 'shapes.png', dpi=80)
    Image.open(HERE / 'shapes.png').convert('RGB').quantize(255).save(HERE / 'shapes.png')  # a sixth of the size
