"""Which measure without labels ranks runs as mBO does? Settings drawn from the space of `slotnb tune`, three seeds.

`python reports/label_free/study.py` trains the runs on the 60 committed training scenes, with the default recipe's
number of epochs and 16x16 patches (224 px). It measures each run without labels, on the training scenes as `slotnb
tune` does and on 40 scenes that `slotnb render --split validation --scenes 40 --seed 24 --samples 16` renders, and
scores its masks on these 40.
Nothing was chosen on these scenes, and the test scenes are not used. It writes runs.csv (one row a run) and seeds.csv
(one row a setting: agreement of its seeds) beside this file; finished runs are kept, so the same command resumes, and
`--collect` writes the tables of what is finished.
"""

import argparse
import os
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from tqdm import tqdm
from slotnb.core import cache_dir, read_json, write_json
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures, extract
from slotnb.formats.detect import open_dataset
from slotnb.label_free import Mirrored, mean_agreement, measure_run
from slotnb.metrics import evaluate_labels, evaluate_masks
from slotnb.model import predict
from slotnb.losses import feature_mse, feature_spread
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone, prepare
from slotnb.runs.state import read_metrics
from slotnb.scenes.render import render
from slotnb.train import fit

ROOT, HERE = Path(__file__).parents[2], Path(__file__).parent
FOLDER = cache_dir() / 'label_free'
SEEDS = (0, 1, 2)
NAMES = ('normalizer', 'lr', 'num_slots', 'attn_temperature')


def settings(num=12):
    "The default recipe, and settings drawn from the space that `slotnb tune` searches, with a wider learning rate."
    rng, drawn = np.random.default_rng(0), [{}]
    for i in range(num):
        drawn.append(
            dict(
                normalizer=('lda', 'pca', 'instance')[i % 3],
                lr=float(f'{10 ** rng.uniform(-3.7, -1.7):.2g}'),
                num_slots=int(rng.integers(6, 17)),
                attn_temperature=float(f'{2 ** rng.uniform(-1, 1):.2g}'),
            )
        )
    return drawn


SETTINGS = settings()


def config_of(i, seed):
    folder = FOLDER / f'{i:02}-seed{seed}'
    data = str(ROOT / 'data/movi_a_subset')
    same = dict(resolution='224', data_dir=data, device='cpu')  # a fifth of the time of 448
    return TrainConfig(**SETTINGS[i], **same, save_dir=str(folder), seed=seed)


def validation_scenes():
    render(out_dir=str(FOLDER / 'validation'), scenes=40, split='validation', seed=24, samples=16)
    return open_dataset(FOLDER / 'validation', 'validation', progress=False)


def own_fvu(run, feats):
    "FVU in the run's own space, as `val_fvu` of metrics.csv."
    x = LazyFeatures(feats, run.normalizer).load()
    out = predict(run.model, x, run.config.seed)
    return (feature_mse(out.recon, out.target) / feature_spread(out.target)).item()


def one_run(i, seed):
    "Train one run, measure it and score it, if that is not done yet."
    torch.set_num_threads(1)
    config = config_of(i, seed)
    kept = Path(config.save_dir) / 'measured.json'
    if kept.is_file():
        return
    run = load_run(fit(config, show_progress=False))
    data, net, scenes = prepare(config, show_progress=False), frozen_backbone(config), list(validation_scenes())
    validation = open_dataset(FOLDER / 'validation', 'validation', progress=False)
    row = dict(setting=i, seed=seed) | {name: getattr(config, name) for name in NAMES}
    row['val_fvu'] = float(read_metrics(config.run_dir).val_fvu.min())
    feats, found = LazyFeatures(extract(net, validation, show_progress=False)), {}
    mirrored = LazyFeatures(extract(net, Mirrored(validation), show_progress=False))
    found['new'] = measure_run(run, feats, scenes, mirrored)
    found['train'] = measure_run(run, data.train_and_val, list(data.scenes['train']), edges=False)
    row['fvu_new'], row['fvu_train'] = own_fvu(run, feats), own_fvu(run, data.train_and_val)
    for where, measured in found.items():
        row |= {f'{k}_{where}': v for k, v in measured.table.mean().items()}
    tables = [evaluate_masks(scenes, list(found['new'].merged), 'merged', net.grid)]
    tables.append(evaluate_labels(scenes, found['new'].refined, 'refined'))
    for table in tables:
        scores = table.drop(columns=['scene', 'frame']).mean()
        row |= {k: float(v) for k, v in scores.items() if k.split('_')[0] in ('ari', 'fg', 'mbo')}
    save_tensors(kept.with_name('labels.safetensors'), {k: m.labels for k, m in found.items()})
    write_json(kept, row)


def collect():
    "Tables of all runs that are finished."
    rows, seeds = [], []
    for i in range(len(SETTINGS)):
        folders = [Path(config_of(i, s).save_dir) for s in SEEDS]
        folders = [f for f in folders if (f / 'measured.json').is_file()]
        rows += [read_json(f / 'measured.json') for f in folders]
        if len(folders) > 1:
            labels = [load_tensors(f / 'labels.safetensors')[0] for f in folders]
            found = {f'seeds_{k}': mean_agreement([x[k] for x in labels]).mean() for k in ('new', 'train')}
            seeds.append(dict(setting=i, runs=len(folders)) | found)
    pd.DataFrame(rows).round(5).to_csv(HERE / 'runs.csv', index=False)
    pd.DataFrame(seeds).round(5).to_csv(HERE / 'seeds.csv', index=False)
    print(len(rows), 'runs of', len(SETTINGS) * len(SEEDS))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--collect', action='store_true', help='write the tables of the finished runs, train nothing')
    p.add_argument('--workers', type=int, default=os.cpu_count(), help='processes')
    args = p.parse_args()
    if not args.collect:
        prepare(config_of(0, 0))  # features, once, before all processes
        for data in (validation_scenes(), Mirrored(validation_scenes())):
            extract(frozen_backbone(config_of(0, 0)), data)
        jobs = [(i, s) for s in SEEDS for i in range(len(SETTINGS))]  # a seed of all settings before the next
        done = Parallel(args.workers, return_as='generator_unordered')(delayed(one_run)(*job) for job in jobs)
        for _ in tqdm(done, 'runs', len(jobs), unit='run'):
            pass
    collect()
