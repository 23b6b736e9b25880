"""The committed tables of reports/claims, as the verdicts and the notebooks read them.

A run has *failed* if it did not finish, if a collapse was reported, or if the mBO of its masks is below that of
twelve fixed blocks, which ignore the image.
"""

from dataclasses import dataclass
from pathlib import Path
import pandas as pd
from slotnb.core import SlotnbError, read_json
from slotnb.runs.verify import verified
from slotnb.study import Estimate, estimate, paired

SCORES = ('fg_ari_attn', 'mbo_attn')  # on the test scenes, of slot attention's masks


@dataclass(frozen=True)
class Evidence:
    "All measurements."

    rows: pd.DataFrame  # of `slotnb.study.collect`
    features: pd.DataFrame  # of `measures.feature_rows`
    floors: pd.DataFrame  # of `slotnb.sweep.score_floors`
    times: dict  # of `times.time_rows`
    missing: dict  # backbone: why it was not measured

    @classmethod
    def read(
        cls,
        folder: str | Path,  # where `run.measure_claims` wrote
    ) -> 'Evidence':
        "Read the tables. `SlotnbError` names one that is missing or was changed."
        folder = Path(folder)
        for name in ('runs.csv', 'features.csv', 'floors.csv', 'times.json', 'provenance.json'):
            if not (folder / name).is_file():
                raise SlotnbError(f'{folder / name} is missing; python reports/claims writes it')
        for path in folder.glob('*.csv'):
            verified(path)
        rows = pd.read_csv(folder / 'runs.csv', dtype=dict(failed=str, collapse=str))
        return cls(
            rows.fillna(dict(failed='', collapse='')),
            pd.read_csv(folder / 'features.csv'),
            pd.read_csv(folder / 'floors.csv'),
            read_json(folder / 'times.json'),
            read_json(folder / 'provenance.json')['missing'],
        )

    def has(self, *arms: str) -> bool:
        "Whether all of these arms were run."
        return set(arms) <= set(self.rows.arm)

    def mean(
        self,
        arm: str,
        column: str,  # of `rows`
    ) -> Estimate:
        "Mean over the seeds of an arm."
        return estimate(self.rows[self.rows.arm == arm][column])

    def diff(
        self,
        arm: str,  # minus base
        column: str,
        base: str = 'base',
    ) -> Estimate:
        "Mean difference, paired by seed."
        return paired(self.rows, arm, base, column)

    def blocks(
        self,
        column: str = 'mbo_masks',  # of `floors`
    ) -> float:  # as a fraction
        "Score of twelve fixed blocks."
        return self.floors[self.floors.method == '12 fixed blocks'][column].iloc[0]

    def failed(
        self,
        arm: str,
    ) -> float:  # share of the seeds
        "Share of the runs that did not finish, collapsed, or are worse than blocks."
        r = self.rows[self.rows.arm == arm]
        return float(((r.failed != '') | (r.collapse != '') | (r.mbo_attn < self.blocks())).mean())

    def worse(
        self,
        arm: str,
        base: str = 'base',
        points: float = 0.0,  # smallest loss in FG-ARI and in mBO (0 to 100)
    ) -> bool:
        "Whether FG-ARI and mBO are both lower than the base's by more than `points`, with intervals below 0."
        differences = [self.diff(arm, c, base) for c in SCORES]
        return all(d.high < 0 and 100 * d.mean < -points for d in differences)

    def better(
        self,
        arm: str,
        base: str = 'base',
    ) -> bool:
        "Whether FG-ARI or mBO is higher than the base's, with an interval above 0, and neither is lower."
        differences = [self.diff(arm, c, base) for c in SCORES]
        return any(d.low > 0 for d in differences) and not any(d.high < 0 for d in differences)

    def masks(
        self,
        arm: str,
        base: str = 'base',
    ) -> str:
        "The paired differences as text."
        names = zip(('FG-ARI', 'mBO'), SCORES)
        return ', '.join(f'{n} {self.diff(arm, c, base).text(100, sign=True)}' for n, c in names)
