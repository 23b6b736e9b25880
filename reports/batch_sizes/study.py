"""Batch sizes and rules of the learning rate: the default recipe with nothing else changed, the same number of epochs.

Three seeds, scored on the 40 validation scenes of reports/objects/ablation.py; the test scenes are not used.
`python reports/batch_sizes/study.py` writes study.csv beside this file; finished runs are kept.
"""

import sys
from pathlib import Path
import pandas as pd
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1] / 'objects'))
from ablation import ROOT, SCORES, SEEDS, validation_scenes
from slotnb.core import batches, cache_dir, read_json, write_json
from slotnb.evaluate import load_run
from slotnb.features import LazyFeatures, extract
from slotnb.metrics import evaluate_masks
from slotnb.model import outputs
from slotnb.refine import merge_slots
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import frozen_backbone, prepare
from slotnb.runs.state import read_metrics
from slotnb.train import fit

FOLDER = cache_dir() / 'batch_sizes'
ARMS = [(8, 'none')]  # at 8 the rules are the same
ARMS += [(batch, rule) for batch in (32, 64, 2) for rule in ('none', 'sqrt', 'linear')]


def score(batch, rule, seed):
    "Train one run and score it, if that is not done yet."
    kept = FOLDER / f'{batch}-{rule}-seed{seed}' / 'score.json'
    if kept.is_file():
        return read_json(kept)
    config = TrainConfig(
        data_dir=str(ROOT / 'data/movi_a_subset'),
        save_dir=str(kept.parent),
        batch_size=batch,
        lr_rule=rule,
        seed=seed,
        device='cpu',
    )
    data = prepare(config, show_progress=False)
    run = load_run(fit(config, show_progress=False, data=data))
    scenes, net = validation_scenes(), frozen_backbone(config)
    feats = LazyFeatures(extract(net, scenes, show_progress=False), run.normalizer)
    images, rows = list(scenes), []
    for x, out in zip(batches(feats, 8), outputs(run.model, feats, seed, 8)):
        some, images = images[: len(x)], images[len(x) :]
        merged = [merge_slots(m, f, net.grid) for m, f in zip(out.attn, x)]
        tables = [evaluate_masks(some, out.attn, 'attn', net.grid), evaluate_masks(some, merged, 'merged', net.grid)]
        rows.append(pd.concat([t.set_index(['scene', 'frame']) for t in tables], axis=1))
    columns = [f'{m}_{k}' for k in ('attn', 'merged') for m in SCORES]
    curve = read_metrics(run.folder)
    found = dict(lr=curve.lr.max(), steps=config.num_epochs * -(-len(data.train) // batch), val_fvu=curve.val_fvu.min())
    found |= dict(grad_norm=curve.grad_norm.iloc[-10:].mean())
    result = dict(batch=batch, rule=rule, seed=seed) | found | pd.concat(rows)[columns].mean().to_dict()
    write_json(kept, result)
    return result


if __name__ == '__main__':
    torch.set_num_threads(1)
    jobs = [(batch, rule, seed) for batch, rule in ARMS for seed in SEEDS]
    done = [score(*job) for job in tqdm(jobs, 'runs', unit='run')]
    pd.DataFrame(done).round(5).to_csv(Path(__file__).with_name('study.csv'), index=False)
