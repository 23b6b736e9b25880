"The claims study: each rule can give each verdict, the committed tables give the committed verdicts."

import json
import re
import subprocess
import sys
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from claims import run
from claims.evidence import Evidence
from claims.measures import pixel_errors, regions
from claims.pages import NOTEBOOKS, pages_of
from claims.protocol import ARMS, BATCHES, QUESTIONS, RECIPE, chosen_defaults, winners
from claims.rules import HOLDS, NOT, PART, UNITS, UNMEASURED
from claims.run import ClaimsConfig, chosen_arms
from claims.verdicts import CLAIMS, claims_html, claims_table
from slotnb.core import SlotnbError
from slotnb.runs.checkpoints import load_tensors
from slotnb.runs.config import preset
from slotnb.study import plan_study

RESULTS = ROOT / 'reports/claims'


# the rules, with invented evidence


def made(**arms):
    "Evidence of five seeds; each arm is a dict of its means. Seeds share a part of the noise, as in real studies."
    draw, rows = np.random.default_rng(0), []
    shared = draw.normal(0, 0.02, 5)
    usual = dict(
        fg_ari_train=0.4,
        mbo_train=0.32,
        fg_ari_attn=0.45,
        mbo_attn=0.35,
        mask_max=0.8,
        test_mse=0.27,
        test_fvu=0.27,
        test_fvu_instance=0.27,
        train_mse=0.26,
        slot_cosine=-0.05,
        settled=20,
        target_std_kept=1.0,
        target_rank_kept=1.0,
        grad_norm=1.0,
    )
    for name, other in arms.items():
        for s in range(5):
            values = {k: other.get(k, v) + shared[s] * (v < 1) + draw.normal(0, 0.002) for k, v in usual.items()}
            rows.append(dict(arm=name, seed=s, failed='', collapse=other.get('collapse', '')) | values)
    times = dict(
        device='cpu',
        scenes=60,
        epoch_seconds=0.5,
        steps_seconds=0.4,
        held_out_seconds=0.1,
        read_images_per_second={'0': 50.0, '8': 60.0},
        dinov2_vits14=dict(gflop_per_image=1.0),
        clip_vitb16=dict(gflop_per_image=3.0),
    )
    floors = pd.DataFrame([dict(method='12 fixed blocks', mbo_masks=0.25)])
    return Evidence(pd.DataFrame(rows), pd.DataFrame([dict(arm='base', std=2.5)]), floors, times, {})


def verdict(number, **arms):
    return CLAIMS[number - 1].judge(made(**arms)).verdict


SAME = {}
LOW = dict(fg_ari_attn=0.3, mbo_attn=0.27)
HIGH = dict(fg_ari_attn=0.5, mbo_attn=0.4)
GONE = dict(mbo_attn=0.1, fg_ari_attn=0.1, collapse='masks are uniform')
EASY = dict(test_mse=0.03, target_std_kept=0.1)


def scales(a, b, c, **more):
    errors = dict(zip(('std0.47', 'std2.41', 'std3.74'), ((a, 0.03), (b, 0.7), (c, 1.5))))
    return {'none': {}} | {arm: other | dict(test_mse=mse) for arm, (other, mse) in errors.items()} | more


def targets(raw, instance):
    return {'base': {}, 'none': {}, 'learned-target': raw, 'learned-target-instance': instance}


def batches(*arms):
    return {'base': {}} | dict(zip(BATCHES, arms))


def failures(mlp, learned):
    return targets(learned, learned) | {'tied': {}, 'mlp': mlp}


CASES = [
    (1, {'base': {}}, PART),
    (2, scales(SAME, SAME, SAME), UNITS),
    (2, scales(GONE, SAME, SAME), PART),
    (2, scales(GONE, SAME, GONE), HOLDS),
    (3, scales(SAME, SAME, SAME, base={}), NOT),
    (3, scales(LOW, SAME, SAME, base={}), PART),
    (3, scales(LOW, LOW, LOW, base={}, none=LOW), HOLDS),
    (4, targets(EASY, SAME), UNITS),
    (4, targets(SAME, SAME), NOT),
    (4, targets(dict(fg_ari_attn=0.6, mbo_attn=0.5), SAME), HOLDS),
    (5, {'base': HIGH, 'mask1.0': dict(mask_max=0.65)}, HOLDS),
    (5, {'base': {}, 'mask1.0': dict(mask_max=0.65)}, PART),
    (5, {'base': dict(mask_max=0.6), 'mask1.0': dict(mask_max=0.65)}, NOT),
    (6, dict(base={}, linear=GONE), HOLDS),
    (6, dict(base={}, linear=LOW), PART),
    (6, dict(base={}, linear=SAME), NOT),
    (7, {'base': {}, 'torch-init': LOW}, HOLDS),
    (7, {'base': {}, 'torch-init': dict(mbo_attn=0.3)}, PART),
    (7, {'base': {}, 'torch-init': SAME}, NOT),
    (8, dict(base=HIGH, div0=dict(slot_cosine=0.3)), HOLDS),
    (8, dict(base={}, div0=dict(slot_cosine=0.3)), PART),
    (8, dict(base=dict(slot_cosine=0.3), div0=dict(slot_cosine=0.3)), NOT),
    (9, batches(*[GONE] * 6), HOLDS),
    (9, batches(LOW, *[SAME] * 5), NOT),
    (9, batches(GONE, *[SAME] * 5), PART),
    (9, batches(*[SAME] * 6), NOT),
    (10, dict(base={}), UNMEASURED),
    (10, dict(base={}, dino_vits16=dict(test_fvu_instance=0.35)), HOLDS),
    (10, dict(base={}, dino_vits16={}), NOT),
    (11, dict(base={}), UNMEASURED),
    (12, dict(base={}), UNMEASURED),
    (13, failures(dict(settled=5), dict(settled=5)), HOLDS),
    (13, failures(dict(settled=30), dict(settled=5)), PART),
    (13, failures(SAME, dict(settled=30)), NOT),
]


@pytest.mark.parametrize('number, arms, expected', CASES, ids=lambda x: x if isinstance(x, (int, str)) else '')
def test_a_rule_can_give_each_of_its_verdicts(number, arms, expected):
    assert verdict(number, **arms) == expected


def test_the_rule_of_the_defaults():
    high = dict(fg_ari_train=0.5, mbo_train=0.4)
    one_score = dict(fg_ari_train=0.5)  # is not enough
    arms = {'base': {}, 'attn0.1': high, 'attn0.2': high | dict(mbo_train=0.45), 'div0': {}, 'token': one_score}
    assert winners(made(**arms).rows) == dict(attn_temperature=0.2)
    long = {'best-long': high, 'long': {}}
    assert chosen_defaults(made(base={}, div0=high, **long).rows) == dict(diversity_weight=0.0)
    assert chosen_defaults(made(base={}, div0=high, **long | {'best-long': {}}).rows) == {}


def test_the_table_has_a_link_per_claim_and_escapes_text():
    table = claims_table(made(base={}, div0={}))
    assert claims_html(table).count('href="#') == 13 and '<b>' not in claims_html(table.assign(why='<b>'))


# the committed tables


@pytest.fixture(scope='module')
def evidence():
    return Evidence.read(RESULTS)


def shown_table():
    "The verdicts on the page, from its stored output."
    cells = json.loads((ROOT / 'reports/claims.ipynb').read_text())['cells']
    outputs = [o['data'] for c in cells for o in c.get('outputs', []) if 'data' in o]
    texts = [''.join(data['text/html']) for data in outputs if 'text/html' in data]
    return next(t for t in texts if 'verdict' in t)


def test_every_verdict_follows_from_the_committed_numbers(evidence):
    "The rules applied again; the page shows the same verdicts and the same numbers."
    table = claims_table(evidence)
    assert len(table) == 13 and set(table.verdict) <= {HOLDS, PART, NOT, UNITS, UNMEASURED}
    assert shown_table() == claims_html(table)


def test_the_verdicts_can_fail(evidence):
    "If the seeds of two arms are exchanged, a verdict changes: the table is computed, not copied."
    exchanged = evidence.rows.assign(arm=evidence.rows.arm.replace(dict(base='mlp', mlp='base')))
    other = claims_table(Evidence(exchanged, evidence.features, evidence.floors, evidence.times, evidence.missing))
    assert list(other.verdict) != list(claims_table(evidence).verdict)


def test_committed_runs_are_complete(evidence):
    "Five seeds of every arm that could be measured, each with its scores; the others are listed as missing."
    count = evidence.rows.groupby('arm').seed.nunique()
    assert set(count.index) - {'best', 'best-long'} == set(ARMS) - set(evidence.missing) and (count == 5).all()
    finished = evidence.rows[evidence.rows.failed == '']
    scores = ['fg_ari_attn', 'mbo_attn', 'ari_attn', 'test_fvu', 'fg_ari_train', 'mbo_train']
    assert finished[scores].notna().to_numpy().all()
    provenance = json.loads((RESULTS / 'provenance.json').read_text())
    assert {'seconds', 'versions', 'machine', 'date', 'config', 'base'} <= set(provenance)
    assert provenance['config']['num_epochs'] == ClaimsConfig.num_epochs
    assert provenance['seconds'] < 100 * 60  # on two cores
    masks, _ = load_tensors(RESULTS / 'masks.safetensors')
    assert set(masks) == set(count.index)
    for m in masks.values():
        np.testing.assert_allclose(m.float().sum(1), 1, atol=5e-3)
    assert sum(p.stat().st_size for p in RESULTS.iterdir()) < 3e6


def test_defaults_are_what_the_rule_chose(evidence):
    "The rule of reports/claims/protocol.py, applied to the committed numbers, gives the library's defaults."
    default, chosen = preset('version_0_1'), RECIPE | chosen_defaults(evidence.rows)
    assert {k: getattr(default, k) for k in chosen} == chosen
    cells = json.loads((ROOT / 'reports/claims.ipynb').read_text())['cells']
    texts = [''.join(o.get('data', {}).get('text/markdown', '')) for c in cells for o in c.get('outputs', [])]
    shown = re.findall(r'\*\*`(\w+) = ([^`]+)`\*\*', next(t for t in texts if 'Won alone' in t))
    assert shown == [(k, str(v)) for k, v in chosen_defaults(evidence.rows).items()]


def test_missing_tables(tmp_path):
    with pytest.raises(SlotnbError, match='runs.csv is missing; python reports/claims writes it'):
        Evidence.read(tmp_path)


# the protocol


def test_arms_change_what_they_list():
    "Every setting is a field that differs from the base, and names are unique."
    base = plan_study([ARMS['base']], (0,), 'x', **RECIPE)['base'][0]
    for arms in QUESTIONS.values():
        for a in arms:
            for k, v in a.settings.items():
                assert getattr(base, k) != v or k == 'num_epochs', f'{a.name}: {k} is the default'
    assert len(ARMS) == sum(map(len, QUESTIONS.values()))
    assert {a for c in CLAIMS for a in c.needs} <= set(ARMS)


def test_unknown_question(capsys):
    with pytest.raises(SlotnbError, match="question 'colour' is unknown; choose one of base, normalization"):
        chosen_arms(ClaimsConfig(only=('colour',)))
    assert run.main(['--only', 'colour']) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


def test_the_command_shows_its_options():
    "From the root of the repository, as a script."
    command = [sys.executable, 'reports/claims', '--help']
    text = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert all(f'--{name}' in text for name in ('out', 'runs_dir', 'only', 'seed', 'pages', 'workers', 'engine'))


def test_regions():
    seg = np.zeros((40, 40), int)
    seg[10:30, 10:30] = 1
    seg[10:30, 30:] = 2
    r = regions(seg, ['metal', 'rubber'])
    assert (r[20, 20], r[20, 29], r[20, 31], r[20, 39], r[5, 5], r[20, 8]) == (
        'metal inside',
        'metal edge',
        'rubber edge',
        'rubber inside',
        'floor inside',
        'floor edge',
    )


def test_pixel_errors():
    "Two certain slots: one covers the left half, the other the right half, of which the object has the upper part."
    import torch

    masks = torch.zeros(2, 4, 4)
    masks[0, :, :2] = masks[1, :, 2:] = 1
    seg = np.zeros((40, 40), int)
    seg[:30, 20:] = 1
    entropy, wrong = pixel_errors(seg, masks.flatten(1), (4, 4))
    assert wrong[30:, 20:].all() and wrong.sum() == 200
    assert entropy[:, :10].max() < 1e-6 and 0.5 < entropy[0, 19] <= 1


def test_pages_of_questions():
    "A page about arms that were not trained would have nothing to show."
    assert pages_of(()) == NOTEBOOKS and all(q in QUESTIONS for q in ('collapse', 'slots', 'temperature', 'features'))

    def stems(*only):
        return [n.split('/')[-1].removesuffix('.ipynb') for n in pages_of(only)]

    assert stems('slots') == ['claims', 'slots', 'uncertainty', 'materials']
    assert stems('temperature', 'batch') == ['claims', 'temperatures', 'uncertainty', 'materials']
