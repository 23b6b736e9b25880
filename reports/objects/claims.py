"""The claims of the source report once more, under the default recipe: one setting changed at a time, paired by seed.

`python reports/objects/claims.py` trains every arm and scores it on the 40 validation scenes of `ablation.py`; the test
scenes are not used. It writes claims.csv beside this file. Finished runs are kept, and all arms of a seed come before
the next seed. A seed with all its arms in claims.csv is not trained again, so that the study may go on on another
machine: an arm is compared with the default of its own seed only.
"""

import sys
from pathlib import Path
import pandas as pd
import torch
from tqdm import tqdm
from ablation import FOLDER, SCORES
from colors import COMMITTED, score
from slotnb.study import Arm, plan_study
from slotnb.train import fit

HERE, STUDY = Path(__file__).parent, FOLDER / 'claims'
SEEDS, BASE = (0, 1, 2, 3, 4), 'default recipe'
QUESTIONS = {
    'base': [Arm(BASE, 'the default of `slotnb train`')],
    'normalization': [
        *(Arm(k, f'normalizer {k} instead of lda', dict(normalizer=k)) for k in ('none', 'instance', 'token')),
        Arm('dataset', 'normalizer dataset instead of lda', dict(normalizer='dataset')),
        Arm('pca', 'normalizer pca, one round', dict(normalizer='pca')),
    ],
    'scale': [
        *(Arm(f'std {s:g}', f'raw features rescaled to std {s:g}', dict(feature_std=s)) for s in (0.47, 3.74)),
        *(
            Arm(f'none, std {s:g}', f'the same without a space, std {s:g}', dict(normalizer='none', feature_std=s))
            for s in (0.47, 3.74)
        ),
    ],
    'temperature': [
        Arm('mask temperature 0.5', 'of the masks that the decoder uses', dict(mask_temperature=0.5)),
        Arm('attention temperature 0.5', "of slot attention's softmax", dict(attn_temperature=0.5)),
    ],
    'diversity': [
        Arm(f'diversity {w:g}', f'slot diversity weight {w:g}', dict(diversity_weight=w)) for w in (0.1, 1.0)
    ],
    'batch': [
        Arm('batch 2', 'batch 2, the same rate', dict(batch_size=2)),
        Arm('batch 2, rate / 4', 'batch 2, rate divided by 4', dict(batch_size=2, lr=0.0005)),
        Arm('batch 16, rate x 2', 'batch 16, rate times 2', dict(batch_size=16, lr=0.004)),
        Arm('batch 32', 'batch 32, the same rate', dict(batch_size=32)),
        Arm('batch 32, rate x 4', 'batch 32, rate times 4', dict(batch_size=32, lr=0.008)),
    ],
    'slots': [Arm(f'{k} slots', f'{k} slots instead of 11', dict(num_slots=k)) for k in (7, 15)],
}


def collect(plan):
    "Mean scores of each finished run."
    columns, rows = [f'{m}_{k}' for k in ('attn', 'merged', 'refined') for m in SCORES], []
    question = {a.name: q for q, arms in QUESTIONS.items() for a in arms}
    for name, configs in plan.items():
        for c in configs:
            file = c.run_dir / 'validation.csv'
            if file.is_file():
                about = dict(question=question[name], arm=name, seed=c.seed)
                rows.append(about | pd.read_csv(file)[columns].mean().to_dict())
    return pd.DataFrame(rows).round(4)


def whole_seeds(arms):
    "The rows of claims.csv of the seeds that have all arms."
    if not (HERE / 'claims.csv').is_file():
        return pd.DataFrame(columns=['seed'])
    rows = pd.read_csv(HERE / 'claims.csv')
    return rows[rows.groupby('seed').arm.transform('nunique') == len(arms)]


if __name__ == '__main__':
    torch.set_num_threads(1)
    arms = [a for group in QUESTIONS.values() for a in group]
    before = whole_seeds(arms)
    seeds = [s for s in (SEEDS[: int(sys.argv[1])] if sys.argv[1:] else SEEDS) if s not in set(before.seed)]
    plan = plan_study(arms, seeds, STUDY, data_dir=str(COMMITTED), device='cpu') if seeds else {}
    for config in tqdm([configs[i] for i in range(len(seeds)) for configs in plan.values()], 'runs', unit='run'):
        if not (config.run_dir / 'validation.csv').is_file():
            fit(config, show_progress=False)
            score(config, 'validation')
            pd.concat([before, collect(plan)]).to_csv(HERE / 'claims.csv', index=False)
