"""The thirteen claims of the source report, the rule of each in a sentence, and the table of verdicts."""

import html
from collections.abc import Callable
from dataclasses import dataclass
import pandas as pd
from claims import rules
from claims.evidence import Evidence
from claims.protocol import BATCHES, FAILURES
from claims.rules import HOLDS, NOT, PART, UNITS, UNMEASURED, Verdict


@dataclass(frozen=True)
class Claim:
    "A statement of the report."

    number: int
    claim: str
    reported: str  # the report's number
    rule: str  # how it is judged
    judge: Callable[[Evidence], Verdict]
    needs: tuple[str, ...]  # arms without which it cannot be judged
    section: str  # of reports/claims.ipynb, with the evidence


CLAIMS = (
    Claim(
        1,
        'The three backbones have feature std 2.41, 3.74 and 0.47',
        '2.41, 3.74, 0.47',
        'holds if all three are within 10 %, in part if those that can be measured are',
        rules.feature_std,
        ('base',),
        'the-features',
    ),
    Claim(
        2,
        'Without normalization training fails for large and for small std',
        'loss 3.903 and -0.014',
        'holds if at least half of the seeds fail at std 0.47 and at 3.74 but not on raw features; in part if they '
        'fail at one; an artifact of units if at none, while the MSE differs more than fourfold',
        rules.no_normalization,
        ('none', 'std0.47', 'std2.41', 'std3.74'),
        'scale-and-normalization',
    ),
    Claim(
        3,
        'Instance normalization is absolutely critical',
        'loss 0.26 for all',
        'holds if every way to omit it loses more than 5 points of FG-ARI and of mBO, intervals below 0; '
        'in part if some do',
        rules.normalization_is_critical,
        ('base', 'none', 'std0.47', 'std2.41', 'std3.74'),
        'scale-and-normalization',
    ),
    Claim(
        4,
        "CLIP's far lower loss could mean better features",
        '0.022 against 0.26',
        "an artifact of units if a learned layer before the target reduces any features' MSE to a fifth or less, "
        "removes half of the target's std or directions, and gives no better masks; holds if such masks are better",
        rules.learned_target,
        ('base', 'none', 'learned-target', 'learned-target-instance'),
        'the-loss-of-clip',
    ),
    Claim(
        5,
        'Mask temperature 0.5 gives 23 % more differentiation',
        '+23 %',
        'holds if the mean of the largest mask rises by 15 to 31 % and FG-ARI or mBO with it; '
        'in part if only the masks become sharper',
        rules.mask_temperature,
        ('base', 'mask1.0'),
        'mask-temperature',
    ),
    Claim(
        6,
        'The 2-layer MLP projection prevents collapse',
        'no number',
        'holds if at least half of the seeds fail with one layer and fewer with two; '
        'in part if one layer only loses FG-ARI and mBO',
        rules.projection,
        ('base', 'linear'),
        'the-recipe',
    ),
    Claim(
        7,
        'Xavier initialization gives proper gradient flow',
        'no number',
        "holds if PyTorch's own fails, or loses FG-ARI and mBO, intervals below 0; in part if it loses one of them",
        rules.xavier,
        ('base', 'torch-init'),
        'the-recipe',
    ),
    Claim(
        8,
        'Slot diversity weight 0.1',
        'no number',
        'holds if FG-ARI or mBO is higher with it; in part if only the cosine of the slots falls',
        rules.diversity,
        ('base', 'div0'),
        'the-recipe',
    ),
    Claim(
        9,
        'Batch 2 is critical, 12 and 16 are unstable',
        'loss 0.7 to 4.0',
        'holds if every way to train at 12 or 16 fails or loses more than 10 points of FG-ARI and mBO; '
        'in part if some do, or if all lose some',
        rules.batch_size,
        ('base', *BATCHES),
        'batch-size',
    ),
    Claim(
        10,
        'DINOv1 trains to the loss of DINOv2 and tests worse',
        '0.260 and 0.747 against 0.262 and 0.620',
        'holds if the training MSE is within 5 % and the test FVU in the common space is higher, interval above 0',
        rules.dino,
        ('base',),
        'backbones',
    ),
    Claim(
        11,
        'An epoch takes 0.4 to 0.9 s, CLIP being fastest by its forward pass',
        '0.7, 0.9, 0.4 s',
        'needs a GPU; holds if an epoch takes 0.4 to 0.9 s',
        rules.epoch_time,
        (),
        'time',
    ),
    Claim(
        12,
        'Eight workers and pinned memory raise the use of the GPU',
        '14 % to 60 %',
        'needs a GPU; holds if eight workers read 60/14 times as fast as none',
        rules.workers,
        (),
        'time',
    ),
    Claim(
        13,
        'Unusually fast convergence is suspicious',
        'no number',
        'holds if every failure with a good loss settles in fewer epochs than the healthy arm beside it, '
        'interval below 0; in part if some do',
        rules.fast_convergence,
        (*FAILURES, *FAILURES.values()),
        'how-failures-are-detected',
    ),
)


def claims_table(
    evidence: Evidence,
    claims: tuple[Claim, ...] = CLAIMS,
) -> pd.DataFrame:  # text, one row per claim
    "The verdict of every claim, computed from the evidence by its rule."
    rows = []
    for c in claims:
        missing = [a for a in c.needs if not evidence.has(a)]
        v = Verdict(UNMEASURED, '', f"not run: {', '.join(missing)}") if missing else c.judge(evidence)
        rows.append(
            dict(
                claim=f'{c.number}. {c.claim}',
                report=c.reported,
                ours=v.ours,
                verdict=v.verdict,
                why=v.why,
                rule=c.rule,
                section=c.section,
            )
        )
    return pd.DataFrame(rows)


COLORS = {HOLDS: '#009e73', PART: '#e69f00', NOT: '#d55e00', UNITS: '#cc79a7', UNMEASURED: '#808080'}
HEADS = ('claim', 'in the report', 'ours (mean ± 95 %, n seeds)', 'verdict', 'why', '')


def claims_html(
    table: pd.DataFrame,  # of `claims_table`
    page: str = '',  # with the evidence, for example 'claims.ipynb'; '' if the table is on that page
) -> str:  # HTML
    "The table for a page: verdict, reason, rule, and a link to the evidence."

    def cell(text, style=''):
        return f'<td style="text-align:left;vertical-align:top;{style}">{text}</td>'

    rows = []
    for r in table.map(html.escape).itertuples():
        cells = (
            cell(r.claim),
            cell(r.report),
            cell(r.ours.replace('; ', ';<br>')),
            cell(r.verdict, f'color:{COLORS[r.verdict]};font-weight:bold'),
            cell(f'{r.why}<br><small>Rule: {r.rule}.</small>'),
            cell(f'<a href="{page}#{r.section}">evidence</a>'),
        )
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ''.join(f'<th style="text-align:left">{h}</th>' for h in HEADS)
    return f'<table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
