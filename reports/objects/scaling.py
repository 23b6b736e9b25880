"""How the masks change with the number of training scenes, for the default recipe, for a mask head that is trained on
its masks, and for the MLP broadcast decoder.

`slotnb render --scenes 1200 --samples 16 --seed 11 --out_dir FOLDER` writes the training scenes; an interrupted
rendering of more than 720 is enough. `python reports/objects/scaling.py FOLDER` trains every arm on the first of them
and scores it on the 40 validation scenes of `ablation.py` and on the committed test scenes. It writes scaling.csv and
scaling_test.png beside this file. Finished runs are kept, and so are the rows of a seed that has all arms of a model,
so that the study may go on on another machine.
"""

import sys
import tarfile
from pathlib import Path
from typing import NamedTuple
import numpy as np
import pandas as pd
import torch
from PIL import Image
from tqdm import tqdm
from ablation import FOLDER, SCORES
from colors import COMMITTED, score
from mask_heads import HEAD, found_by, scenes_of
from slotnb.evaluate import load_run
from slotnb.features import extract
from slotnb.formats.convert import convert
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_scene
from slotnb.plots import match_colors, overlay, panels
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.inputs import frozen_backbone
from slotnb.train import fit

HERE, STUDY = Path(__file__).parent, FOLDER / 'scaling'
SEEDS, SPLITS = (0, 1, 2), ('validation', 'test')
# the broadcast decoder in the recipe of version 0.1, as narrow as in the claims study so that it can be afforded
MLP = {k: v for k, v in PRESETS['version_0_1'].items() if k not in ('num_epochs', 'warmup_epochs')}
MLP |= dict(decoder='mlp', slot_dim=64, hidden_dim=128)


class Arm(NamedTuple):
    model: str
    scenes: int
    epochs: int
    warmup: int
    kind: str  # same steps or same epochs as with 60 scenes
    settings: dict = {}

    @property
    def name(self):
        return f'{self.model}, {self.scenes} scenes, {self.kind}'


RECIPE, BROADCAST, STEPS, EPOCHS = 'default recipe', 'MLP decoder', 'same steps', 'same epochs'
ARMS = [
    *(Arm(RECIPE, n, e, w, STEPS) for n, e, w in ((60, 45, 7), (120, 23, 4), (240, 12, 2), (480, 6, 1), (720, 4, 1))),
    *(Arm(BROADCAST, n, e, w, STEPS, MLP) for n, e, w in ((60, 36, 6), (240, 9, 2), (720, 3, 1))),
    Arm(RECIPE, 240, 45, 7, EPOCHS),
    Arm(BROADCAST, 240, 36, 6, EPOCHS, MLP),
]
WITH_HEAD = [a for a in ARMS if (a.model, a.kind) == (RECIPE, STEPS) and a.scenes in (60, 240)]


def first_scenes(source, count):
    "A dataset of the first training scenes of shards, and the committed test scenes."
    folder = STUDY / f'data-{count}'
    if not (folder / 'train-000.tar').is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part, kept = folder / 'part', set()
        with tarfile.open(part, 'w') as out:
            for file in sorted(Path(source).glob('train-*.tar')):
                with tarfile.open(file) as shard:
                    for member in shard:
                        kept.add(scene := member.name.split('.')[0])
                        if len(kept) > count:
                            kept.remove(scene)
                            break
                        out.addfile(member, shard.extractfile(member))
        if len(kept) < count:
            sys.exit(f'{source}: holds {len(kept)} training scenes, {count} are needed')
        part.rename(folder / 'train-000.tar')
    convert(open_dataset(COMMITTED, 'test', progress=False), folder, 'webdataset', 'test', progress=False)
    return folder


class Known:
    "A backbone that looks up the tokens of images which are in another dataset's cache."

    def __init__(self, net, dataset):
        self.net, self.device, self.record = net, net.device, net.record
        tokens = extract(net, dataset)
        self.known = {s.image.transpose(2, 0, 1).tobytes(): x for s, x in zip(dataset, tokens)}

    def __call__(self, images):
        return torch.stack([self.known[im.numpy().tobytes()] for im in images])


def config_of(arm, seed, data):
    folder = STUDY / f'{arm.name.replace(", ", "-").replace(" ", "-")}-seed{seed}'
    about = dict(data_dir=str(data), save_dir=str(folder), seed=seed, device='cpu')
    return TrainConfig(**arm.settings | about | dict(num_epochs=arm.epochs, warmup_epochs=arm.warmup))


def extract_all(model, folders):
    "The features of a model's largest dataset; those of the smaller ones are looked up in them."
    arms = [a for a in ARMS if a.model == model]
    *smaller, largest = sorted({a.scenes for a in arms})
    net = frozen_backbone(config_of(arms[0], 0, folders[largest]))
    known = Known(net, open_dataset(folders[largest], 'train', progress=False))
    for n in smaller:
        extract(known, open_dataset(folders[n], 'train', progress=False), show_progress=False)


def score_head(config, split):
    "Scores of the segments of a mask head that is trained on a run's own masks of its training scenes."
    run = load_run(config.run_dir)
    pairs = zip(scenes_of(run, split), found_by(run, HEAD, split))
    table = pd.DataFrame([evaluate_scene(s.segmentation, x) for s, x in pairs])[[*SCORES]]
    table.add_suffix('_head').to_csv(config.run_dir / f'head-{split}.csv', index=False)


def whole_seeds(runs):
    "The rows of scaling.csv of the models and seeds that have all arms of their kind."
    if not (HERE / 'scaling.csv').is_file():
        return pd.DataFrame(columns=['arm', 'seed'])
    wanted = pd.Series([(a.model, a.kind, seed) for a, seed, _ in runs]).value_counts()
    rows = pd.read_csv(HERE / 'scaling.csv')
    groups = rows.groupby(['model', 'kind', 'seed'])
    return groups.filter(lambda g: g.arm.nunique() == wanted[g.name])


def collect(runs):
    "Mean scores of each run and split, and the training's last losses."
    columns, rows = [f'{m}_{k}' for k in ('attn', 'merged', 'refined') for m in SCORES], []
    for arm, seed, config in runs:
        if not (config.run_dir / 'test.csv').is_file():
            continue
        last = pd.read_csv(config.run_dir / 'metrics.csv').iloc[-1]
        about = dict(arm=arm.name, model=arm.model, scenes=arm.scenes, kind=arm.kind, seed=seed)
        about |= dict(mse=last.mse, val_fvu=last.val_fvu, mask_entropy=last.val_mask_entropy)
        for split in SPLITS:
            scores = pd.read_csv(config.run_dir / f'{split}.csv')[columns].mean().to_dict()
            if (file := config.run_dir / f'head-{split}.csv').is_file():
                scores |= pd.read_csv(file).mean().to_dict()
            rows.append(about | dict(split=split) | scores)
    return pd.DataFrame(rows).round(4)


def draw(runs, ids):
    "Image, ground truth and refined segments of some test scenes, one row for each arm of the recipe; the first seed."
    every = open_dataset(COMMITTED, 'test', progress=False)
    scenes = [every[i] for i in ids]
    rows = {'image': [s.image for s in scenes], 'ground truth': [overlay(s.image, s.segmentation) for s in scenes]}
    for arm, seed, config in runs:
        if seed == 0 and arm.model == RECIPE and (config.run_dir / 'test.npz').is_file():
            labels = np.load(config.run_dir / 'test.npz')['labels'][[*ids]].astype(int)
            title = f'{arm.scenes} scenes,\n{arm.kind}'
            rows[title] = [overlay(s.image, x, match_colors(s.segmentation, x)) for s, x in zip(scenes, labels)]
    titles = [s.name.removeprefix('scene_') for s in scenes]
    return panels([x for row in rows.values() for x in row], titles, len(ids), 1.3, [*rows])


if __name__ == '__main__':
    torch.set_num_threads(1)
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    folders = {n: first_scenes(sys.argv[1], n) for n in sorted({a.scenes for a in ARMS})}
    runs = [(arm, seed, config_of(arm, seed, folders[arm.scenes])) for arm in ARMS for seed in SEEDS]
    before = whole_seeds(runs)
    kept = {(r.arm, r.seed) for r in before.itertuples()}
    todo = [(arm, seed, config) for arm, seed, config in runs if (arm.name, seed) not in kept]
    extracted = set()
    for arm, _, config in tqdm(todo, 'runs', unit='run'):
        missing = [s for s in SPLITS if not (config.run_dir / f'{s}.csv').is_file()]
        if missing and arm.model not in extracted:
            extract_all(arm.model, folders)
            extracted.add(arm.model)
        if missing:
            fit(config, show_progress=False)
        for split in missing:
            score(config, split)
        for split in SPLITS if arm in WITH_HEAD else ():
            if not (config.run_dir / f'head-{split}.csv').is_file():
                score_head(config, split)
        pd.concat([before, collect(todo)]).to_csv(HERE / 'scaling.csv', index=False)
    file = HERE / 'scaling_test.png'
    draw(runs, range(12)).savefig(file, dpi=100)
    Image.open(file).convert('RGB').quantize(255).save(file)
