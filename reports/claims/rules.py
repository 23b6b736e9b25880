"""The rule of each claim, a function from the evidence to a verdict. `verdicts.CLAIMS` states each in a sentence.

The rules were written before the runs and hold no measured number.
"""

from typing import NamedTuple
from slotnb.study import estimate
from claims.evidence import Evidence
from claims.protocol import BATCHES, FAILURES, SCALES

HOLDS = 'holds'
PART = 'holds in part'
NOT = 'does not hold'
UNITS = 'artifact of units'
UNMEASURED = 'could not be measured here'


class Verdict(NamedTuple):
    "The result of a rule."

    verdict: str  # one of the five
    ours: str  # our numbers with interval and number of seeds
    why: str  # one line


STDS = dict(dinov2_vits14=2.41, dino_vits16=3.74, clip_vitb16=0.47)


def feature_std(e: Evidence) -> Verdict:
    named = {b: e.features[e.features.arm == ('base' if b == 'dinov2_vits14' else b)]['std'] for b in STDS}
    have = {b: float(s.iloc[0]) for b, s in named.items() if len(s)}
    near = {b: abs(v / STDS[b] - 1) <= 0.1 for b, v in have.items()}
    verdict = UNMEASURED if not have else NOT if not all(near.values()) else HOLDS if len(have) == 3 else PART
    missing = ', '.join(b for b in STDS if b not in have)
    return Verdict(
        verdict,
        ', '.join(f'{b} {v:.2f}' for b, v in have.items()),
        f'within 10 %: {sum(near.values())} of {len(have)} that could be measured; '
        + (f'{missing}: no weights here' if missing else 'all three measured'),
    )


def no_normalization(e: Evidence) -> Verdict:
    fails = [s for s in (0.47, 3.74) if e.failed(f'std{s}') >= 0.5]
    mse = {s: e.mean(f'std{s}', 'test_mse').mean for s in SCALES}
    if len(fails) == 2 and e.failed('none') < 0.5:
        verdict = HOLDS
    elif fails:
        verdict = PART
    else:
        verdict = UNITS if mse[3.74] > 4 * mse[0.47] else NOT

    def numbers(s):
        arm = f'std{s}'
        mse, fvu = (e.mean(arm, c).text(digits=3) for c in ('test_mse', 'test_fvu'))
        return f'std {s:g}: failed {100 * e.failed(arm):.0f} %, MSE {mse}, FVU {fvu}'

    return Verdict(
        verdict,
        '; '.join(map(numbers, SCALES)),
        f'the MSE at 3.74 is {mse[3.74] / mse[0.47]:.0f} times that at 0.47, and the variance is '
        f'{(3.74 / 0.47) ** 2:.0f} times as large; the FVU and the masks measure what was learned',
    )


def normalization_is_critical(e: Evidence) -> Verdict:
    without = ['none', *(f'std{s}' for s in SCALES)]
    worse = [a for a in without if e.worse(a, points=5)]
    return Verdict(
        HOLDS if len(worse) == len(without) else PART if worse else NOT,
        '; '.join(f'{a} - instance: {e.masks(a)}' for a in without),
        f'{len(worse)} of {len(without)} ways to omit it lose more than 5 points of both'
        + (f" ({', '.join(worse)})" if worse else '')
        + f"; training MSE with it {e.mean('base', 'train_mse').text(digits=3)}",
    )


def learned_target(e: Evidence) -> Verdict:
    pairs = {'learned-target': 'none', 'learned-target-instance': 'base', 'learned-target-long': 'long'}
    pairs = {a: b for a, b in pairs.items() if e.has(a, b)}

    def is_easy(a, b):
        shrunk = min(e.mean(a, c).mean for c in ('target_std_kept', 'target_rank_kept')) < 0.5
        return e.mean(a, 'test_mse').mean / e.mean(b, 'test_mse').mean <= 0.2 and shrunk and not e.better(a, b)

    def numbers(a, b):
        ours, theirs = e.mean(a, 'test_mse').text(digits=4), e.mean(b, 'test_mse').text(digits=3)
        std, rank = e.mean(a, 'target_std_kept').text(100, 0), e.mean(a, 'target_rank_kept').text(digits=1)
        return (
            f'{a}: MSE {ours} against {theirs}, std kept {std} %, '
            f'{rank} times as many directions hold 90 % of its variance, {e.masks(a, b)}'
        )

    easy = any(is_easy(a, b) for a, b in pairs.items())
    better = any(e.better(a, b) for a, b in pairs.items())
    return Verdict(
        UNITS if easy else HOLDS if better else NOT,
        '; '.join(numbers(a, b) for a, b in pairs.items()),
        'a target after a learned layer becomes easy with any features; with a fixed target the loss stays'
        if easy
        else 'no learned target lost its content at a fifth of the loss',
    )


def mask_temperature(e: Evidence) -> Verdict:
    r = e.rows.pivot_table(index='seed', columns='arm', values='mask_max')
    more = estimate(r['base'] / r['mask1.0'] - 1)
    better = 0.15 <= more.mean <= 0.31 and e.better('base', 'mask1.0')
    return Verdict(
        NOT if not more.low > 0 else HOLDS if better else PART,
        f"largest mask {more.text(100, 0, True)} %; {e.masks('base', 'mask1.0')}",
        'measure: mean over patches of the largest mask, trained at 0.5 against 1; '
        "objects scored by slot attention's masks",
    )


def projection(e: Evidence) -> Verdict:
    one, two = e.failed('linear'), e.failed('base')
    return Verdict(
        HOLDS if one >= 0.5 > two else PART if e.worse('linear') else NOT,
        f"failed with one layer {100 * one:.0f} %, with two {100 * two:.0f} %; one - two: {e.masks('linear')}",
        f"failed with the MLP decoder: one layer {100 * e.failed('mlp-linear'):.0f} %, "
        f"two {100 * e.failed('mlp'):.0f} %"
        if e.has('mlp', 'mlp-linear')
        else 'default decoder',
    )


def xavier(e: Evidence) -> Verdict:
    lower = any(e.diff('torch-init', c).high < 0 for c in ('fg_ari_attn', 'mbo_attn'))
    fails = e.failed('torch-init') >= 0.5 > e.failed('base') or e.worse('torch-init')
    ours, base = (e.mean(a, 'grad_norm').text(digits=2) for a in ('torch-init', 'base'))
    fvu = e.diff('torch-init', 'test_fvu_instance').text(digits=3, sign=True)
    return Verdict(
        HOLDS if fails else PART if lower else NOT,
        f"PyTorch's - Xavier: {e.masks('torch-init')}; FVU {fvu}",
        f'gradient norm {ours} against {base}',
    )


def diversity(e: Evidence) -> Verdict:
    cosine = e.diff('base', 'slot_cosine', 'div0')
    return Verdict(
        HOLDS if e.better('base', 'div0') else PART if cosine.high < 0 else NOT,
        f"0.1 - 0: cosine of slots {cosine.text(digits=2, sign=True)}, {e.masks('base', 'div0')}",
        'a lower cosine means that the slots move apart; whether the masks improve is a separate question',
    )


def batch_size(e: Evidence) -> Verdict:
    broken = [a for a in BATCHES if e.failed(a) >= 0.5 or e.worse(a, points=10)]
    lower = [a for a in BATCHES if e.worse(a)]
    some = broken or len(lower) == len(BATCHES)
    best = max(BATCHES, key=lambda a: e.mean(a, 'mbo_attn').mean)
    return Verdict(
        HOLDS if len(broken) == len(BATCHES) else PART if some else NOT,
        f"same rate: {e.masks('b16')}; best, {best}: {e.masks(best)}",
        f'failed or lost 10 points: {len(broken)} of {len(BATCHES)}; lost in both scores: {len(lower)}',
    )


def dino(e: Evidence) -> Verdict:
    if not e.has('dino_vits16'):

        def gap(arm):
            return f"{(e.mean(arm, 'test_mse').mean / e.mean(arm, 'train_mse').mean - 1) * 100:+.0f} %"

        train, test = (e.mean('base', c).text(digits=3) for c in ('train_mse', 'test_mse'))
        return Verdict(
            UNMEASURED,
            f'DINOv2: training MSE {train}, test MSE {test}',
            f"no weights of DINOv1 here; test MSE above training MSE with DINOv2: {gap('base')}"
            + (f", in the arm long {gap('long')}" if e.has('long') else ''),
        )
    train, test = e.diff('dino_vits16', 'train_mse'), e.diff('dino_vits16', 'test_fvu_instance')
    same, other = abs(train.mean) <= 0.05 * e.mean('base', 'train_mse').mean, test.low > 0
    return Verdict(
        HOLDS if same and other else PART if other else NOT,
        f'training MSE {train.text(digits=3, sign=True)}, test FVU {test.text(digits=3, sign=True)}',
        'DINOv1 - DINOv2',
    )


def epoch_time(e: Evidence) -> Verdict:
    t = e.times
    steps, held_out = (100 * t[f'{k}_seconds'] / t['epoch_seconds'] for k in ('steps', 'held_out'))
    ours = f"{t['epoch_seconds']:.2f} s for {t['scenes']} scenes on {t['device']}"
    ratio = t['clip_vitb16']['gflop_per_image'] / t['dinov2_vits14']['gflop_per_image']
    why = (
        f'{steps:.0f} % steps, {held_out:.0f} % held-out scenes, none for the backbone, whose features are cached; '
        f"CLIP's backbone needs {ratio:.1f} times the operations of DINOv2's, "
        'so it does not explain a faster epoch with CLIP'
    )
    if not t['device'].startswith('cuda'):
        return Verdict(UNMEASURED, ours, 'the seconds are those of their GPU; here: ' + why)
    return Verdict(HOLDS if 0.4 <= t['epoch_seconds'] <= 0.9 else NOT, ours, why)


def workers(e: Evidence) -> Verdict:
    r = {int(k): v for k, v in e.times['read_images_per_second'].items()}
    most, images = max(r), e.times['scenes']
    ours = ', '.join(f'{w} workers {v:.0f} images/s' for w, v in sorted(r.items()))
    why = (
        f'reading all {images} images takes {images / r[0]:.1f} s without workers; '
        'with cached features they are read once, not in every epoch'
    )
    if not e.times['device'].startswith('cuda'):
        return Verdict(UNMEASURED, ours, 'no GPU whose utilization could rise; ' + why)
    return Verdict(HOLDS if r[most] / r[0] >= 60 / 14 else PART if r[most] > 1.2 * r[0] else NOT, ours, why)


def fast_convergence(e: Evidence) -> Verdict:
    sooner = {a: e.diff(a, 'settled', b) for a, b in FAILURES.items()}
    fast, n = sum(d.high < 0 for d in sooner.values()), len(FAILURES)
    failed = sum(e.failed(a) == 1 for a in FAILURES)
    reported = sum((e.rows[e.rows.arm == a].collapse != '').all() for a in FAILURES)
    return Verdict(
        HOLDS if fast == n else PART if fast else NOT,
        '; '.join(f'{a} settles {d.text(digits=1, sign=True)} epochs against {FAILURES[a]}' for a, d in sooner.items()),
        f'detected in every seed: by fast convergence {fast} of {n} failures, by a reported collapse {reported}, '
        f'by a reported collapse or masks worse than blocks {failed}',
    )
