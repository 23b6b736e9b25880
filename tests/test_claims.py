"The claims: committed numbers give the committed verdicts, and a small version of one of them runs."

import json
import re
import shutil
import numpy as np
import pandas as pd
import pytest
from conftest import DATA, ROOT
from slotnb import claims
from slotnb.claims import (
    ARMS,
    CLAIMS,
    HOLDS,
    NOT,
    NOTEBOOKS,
    PART,
    QUESTIONS,
    RECIPE,
    UNITS,
    UNMEASURED,
    ClaimsConfig,
    Evidence,
    build_claims,
    chosen_arms,
    chosen_defaults,
    claims_table,
    measure_claims,
    pages_of,
    regions,
)
from slotnb.core import SlotnbError
from slotnb.study import plan_study
from slotnb.runs.config import TrainConfig

RESULTS = ROOT / 'reports/claims'


@pytest.fixture(scope='module')
def evidence():
    return Evidence.read(RESULTS)


def shown_table():
    "The verdicts that the page shows, read from its stored output."
    cells = json.loads((ROOT / 'reports/claims.ipynb').read_text())['cells']
    texts = [
        ''.join(o['data']['text/html']) for c in cells for o in c.get('outputs', []) if 'text/html' in o.get('data', {})
    ]
    return next(t for t in texts if 'verdict' in t)


def test_every_verdict_follows_from_the_committed_numbers(evidence):
    "By the written rules, again, and the page shows the same."
    table = claims_table(evidence)
    assert len(table) == 13 and set(table.verdict) <= {HOLDS, PART, NOT, UNITS, UNMEASURED}
    cells = [re.sub(r'<[^>]+>', '', c).strip() for c in re.findall(r'<td[^>]*>.*?</td>', shown_table(), re.S)]
    assert [c for c in cells if c in {HOLDS, PART, NOT, UNITS, UNMEASURED}] == list(table.verdict)


def test_the_verdicts_can_fail(evidence):
    "With the seeds of two arms exchanged, a verdict changes: the table is computed, not copied."
    exchanged = evidence.rows.assign(arm=evidence.rows.arm.replace(dict(base='mlp', mlp='base')))
    other = claims_table(Evidence(exchanged, evidence.features, evidence.floors, evidence.times, evidence.missing))
    assert list(other.verdict) != list(claims_table(evidence).verdict)


def test_committed_runs_are_whole(evidence):
    "Five seeds of every arm that could be had, each with its scores; what is missing is said."
    count = evidence.rows.groupby('arm').seed.nunique()
    assert set(count.index) - {'best', 'best-long'} == set(ARMS) - set(evidence.missing) and (count == 5).all()
    fine = evidence.rows[evidence.rows.failed == '']
    assert fine[['fg_ari_attn', 'mbo_attn', 'ari_attn', 'test_fvu', 'fg_ari_seen', 'mbo_seen']].notna().to_numpy().all()
    book = json.loads((RESULTS / 'provenance.json').read_text())
    assert {'seconds', 'versions', 'machine', 'date', 'config', 'base'} <= set(book) and book['config'][
        'num_epochs'
    ] == ClaimsConfig.num_epochs
    assert book['seconds'] < 100 * 60  # on two cores
    from slotnb.runs.folder import load_tensors

    masks, _ = load_tensors(RESULTS / 'masks.safetensors')
    assert set(masks) == set(count.index)
    for m in masks.values():
        np.testing.assert_allclose(m.float().sum(1), 1, atol=5e-3)
    assert sum(p.stat().st_size for p in RESULTS.iterdir()) < 3e6


def test_defaults_are_what_the_rule_chose(evidence):
    """The rule of reports/claims/protocol.py, applied to the committed numbers, gives the library's defaults; and the
    page says so."""
    default, chosen = TrainConfig(), RECIPE | chosen_defaults(evidence.rows)
    assert {k: getattr(default, k) for k in chosen} == chosen
    cells = json.loads((ROOT / 'reports/claims.ipynb').read_text())['cells']
    said = next(
        t
        for c in cells
        for o in c.get('outputs', [])
        if 'Won alone' in (t := ''.join(o.get('data', {}).get('text/markdown', '')))
    )
    assert re.findall(r'\*\*`(\w+) = ([^`]+)`\*\*', said) == [
        (k, str(v)) for k, v in chosen_defaults(evidence.rows).items()
    ]


def test_arms_change_what_they_say():
    "Every setting is a field that differs from the base, and names are unique."
    base = plan_study([ARMS['base']], (0,), 'x', **RECIPE)['base'][0]
    for arms in QUESTIONS.values():
        for a in arms:
            for k, v in a.settings.items():
                assert getattr(base, k) != v or k == 'num_epochs', f'{a.name}: {k} is the default'
    assert len(ARMS) == sum(map(len, QUESTIONS.values()))
    assert {a for c in CLAIMS for a in c.needs} <= set(ARMS)


def test_unknown_question():
    with pytest.raises(SlotnbError, match="question 'colour' is unknown; choose among base, normalization"):
        chosen_arms(ClaimsConfig(only=('colour',)))


def test_missing_tables(tmp_path):
    with pytest.raises(SlotnbError, match='runs.csv is missing; slotnb claims makes it'):
        Evidence.read(tmp_path)


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


def test_a_small_version_of_one_claim(tmp_path, monkeypatch):
    "Two seeds, two epochs: trained, written, judged, and not trained again."
    config = ClaimsConfig(
        out=str(tmp_path / 'out'),
        runs_dir=str(tmp_path / 'runs'),
        only=('target',),
        seed=(0, 1),
        num_epochs=2,
        data_dir=str(DATA),
        device='cpu',
    )
    assert measure_claims(config, show_progress=False) == {}
    table = claims_table(Evidence.read(config.out))
    assert list(table.verdict[:1]) == [PART] and table.why[3].startswith(
        'not run: none'
    )  # which is of another question
    rows = pd.read_csv(tmp_path / 'out/runs.csv')
    assert (
        list(rows.arm) == [a for a in ('base', 'learnt', 'learnt-instance', 'learnt-long') for _ in '01']
        and rows.seed.tolist() == [0, 1] * 4
    )
    assert np.isfinite(rows.test_mse).all() and rows[rows.arm == 'learnt'].test_fvu_instance.isna().all()

    def stamps():
        return {
            p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').rglob('*') if p.name != 'seconds.txt'
        }  # which counts every command's time

    before = stamps()
    for name, nothing in dict(feature_rows=pd.DataFrame(), score_floors=pd.DataFrame(), time_rows={}).items():
        monkeypatch.setattr(claims, name, lambda *_, nothing=nothing: nothing)  # of no run, and slow
    measure_claims(config, show_progress=False)
    assert stamps() == before and len((tmp_path / 'runs/seconds.txt').read_text().split()) == 2
    assert pd.read_csv(tmp_path / 'out/runs.csv').equals(rows)


def test_pages_are_of_the_questions_asked():
    "A page about arms that nobody asked for would have nothing to show."
    assert pages_of(()) == NOTEBOOKS and all(q in QUESTIONS for q in ('collapse', 'slots', 'temperature', 'features'))
    stems = lambda *only: [n.split('/')[-1].removesuffix('.ipynb') for n in pages_of(only)]
    assert stems('slots') == ['claims', 'slots', 'uncertainty', 'materials'] and stems('temperature', 'batch') == [
        'claims',
        'temperatures',
        'uncertainty',
        'materials',
    ]


def test_links_to_the_evidence(tmp_path, monkeypatch):
    "Every link of the table arrives at a heading of the page, as papermill and nbconvert write it."
    monkeypatch.chdir(ROOT)
    page = build_claims(RESULTS, tmp_path, NOTEBOOKS[:1], show_progress=False)[0].read_text()
    links = set(re.findall(r'<a href="#([^"]+)">evidence</a>', page))
    assert len(links) > 5 and links <= set(re.findall(r'<h[1-6] id="([^"]+)"', page))
