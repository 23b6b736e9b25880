"The claims study from the runs to the pages, with two small arms; the links of its pages."

import re
import numpy as np
import pandas as pd
from conftest import ROOT, copy_scenes
from claims import run
from claims.evidence import Evidence
from claims.pages import NOTEBOOKS, build_pages
from claims.protocol import PICTURES
from claims.rules import PART
from claims.run import ClaimsConfig, measure_claims
from claims.verdicts import claims_table

RESULTS = ROOT / 'reports/claims'


def test_a_small_study(tmp_path, monkeypatch):
    "Some scenes, two seeds, two epochs: trained, written, judged, and not trained again."
    config = ClaimsConfig(
        out=str(tmp_path / 'out'),
        runs_dir=str(tmp_path / 'runs'),
        only=('target',),
        seed=(0, 1),
        num_epochs=2,
        data_dir=str(copy_scenes(tmp_path / 'data', train=12, test=max(PICTURES) + 1)),
        device='cpu',
    )
    assert measure_claims(config, show_progress=False) == {}
    table = claims_table(Evidence.read(config.out))
    assert list(table.verdict[:1]) == [PART]
    assert table.why[3].startswith('not run: none')  # an arm of another question
    rows = pd.read_csv(tmp_path / 'out/runs.csv')
    arms = ('base', 'learned-target', 'learned-target-instance', 'learned-target-long')
    assert list(rows.arm) == [a for a in arms for _ in '01'] and rows.seed.tolist() == [0, 1] * 4
    assert np.isfinite(rows.test_mse).all() and rows[rows.arm == 'learned-target'].test_fvu_instance.isna().all()
    assert {'fg_ari_train', 'mbo_train', 'engine'} <= set(rows)
    times, committed = Evidence.read(config.out).times, Evidence.read(RESULTS).times
    assert set(times) == set(committed)

    def stamps():
        "Without seconds.txt, to which every command adds its time."
        return {p: p.stat().st_mtime_ns for p in (tmp_path / 'runs').rglob('*') if p.name != 'seconds.txt'}

    before = stamps()
    for name, nothing in dict(feature_rows=pd.DataFrame(), score_floors=pd.DataFrame(), time_rows={}).items():
        monkeypatch.setattr(run, name, lambda *_, nothing=nothing: nothing)  # not about runs, and slow
    measure_claims(config, show_progress=False)
    assert stamps() == before and len((tmp_path / 'runs/seconds.txt').read_text().split()) == 2
    assert pd.read_csv(tmp_path / 'out/runs.csv').equals(rows)


def test_links_to_the_evidence(tmp_path, monkeypatch):
    "Every link of the table is a heading of the page, as papermill and nbconvert write it."
    monkeypatch.chdir(ROOT)
    page = build_pages(RESULTS, tmp_path, NOTEBOOKS[:1], show_progress=False)[0].read_text()
    links = set(re.findall(r'<a href="#([^"]+)">evidence</a>', page))
    assert len(links) > 5 and links <= set(re.findall(r'<h[1-6] id="([^"]+)"', page))
