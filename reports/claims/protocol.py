"""The claims study: which runs test the thirteen claims of the source report. This file is also the command.

Everything here was written before the runs: the arms, the rule by which a setting becomes a default, and (in `rules`
and `verdicts`) the rule of each verdict.

**Arms.** Every arm differs from `base` in the settings that it lists and in nothing else. `base` is the report's
recipe with the attention decoder, which does not collapse, and 11 slots. It has 30 epochs instead of 200, so that
five seeds of all arms fit on two cores; the arm `long` has 200. Arms of one question stand together in `QUESTIONS`.

Two statements of the report needed an interpretation:

- *Loss rescaled.* Dividing the MSE by the variance of the features is, for Adam, the same as multiplying the
  diversity weight and the clip norm by it: a step of Adam does not change when all gradients are scaled.
- *MLP decoder.* At the papers' width a run takes too long for five seeds of ten arms. These arms are narrow (slots of
  64 channels, 128 hidden channels) and are compared with each other.

**Defaults.** A setting is chosen by the masks of the *training* scenes; the test scenes are not used. For each field
in `CHOICES`, the arm with the highest mBO wins among the arms whose FG-ARI and mBO are both higher than those of
`base`, with intervals above 0. All winners are combined and trained once more for 30 epochs (`best`) and for 200
epochs (`best-long`). The library's defaults change only if `best-long` is better than `long` in both scores, with
intervals above 0. Settings that cost more (resolution, slots, epochs) or that depend on the data and the backbone
(slots, layer, facet) are not chosen in this way.
"""

import pandas as pd
from slotnb.runs.config import PRESETS
from slotnb.study import Arm, paired

# of `base`; its epochs are the study's own
RECIPE = {k: v for k, v in PRESETS['version_0_1'].items() if k != 'num_epochs'}
SCALES = (0.47, 2.41, 3.74)  # the report's feature stds: CLIP, DINOv2, DINOv1
SMALL = dict(slot_dim=64, hidden_dim=128)
MLP = SMALL | dict(decoder='mlp')


def _scaled(std, name='', **more):
    why = f'raw features rescaled to std {std:g}, no normalization'
    return Arm(f'std{std}{name}', why, dict(normalizer='none', feature_std=std) | more)


def _bare(std):
    why = f'neither LayerNorm nor normalization, std {std:g}'
    return Arm(f'bare-std{std}', why, dict(projection='bare', normalizer='none', feature_std=std))


def _target(name, why, **more):
    return Arm(f'learned-target{name}', why, dict(normalizer='none') | more)


QUESTIONS = {  # name: arms
    'base': [Arm('base', "the report's recipe with the attention decoder")],
    'normalization': [
        *(Arm(k, f'normalizer {k}', dict(normalizer=k)) for k in ('none', 'token', 'dataset')),
        *map(_scaled, SCALES),
        *(_scaled(s, '-loss', diversity_weight=0.1 * s * s, clip_norm=s * s) for s in (0.47, 3.74)),
        *(_scaled(s, '-lr', lr=0.0004 * s) for s in (0.47, 3.74)),
        Arm('bare', 'no LayerNorm before the projection', dict(projection='bare')),
        *map(_bare, SCALES),
    ],
    'target': [
        _target('', 'a learned layer (384 to 384) before the target', target='learned'),
        _target('-instance', 'the same, with instance normalization after the layer', target='learned_instance'),
        _target(
            '-long',
            'the previous arm for 200 epochs, as in the report; compare with long',
            target='learned_instance',
            num_epochs=200,
        ),
    ],
    'temperature': [
        Arm('mask1.0', 'mask temperature 1', dict(mask_temperature=1.0)),
        Arm('mask0.25', 'mask temperature 1/4', dict(mask_temperature=0.25)),
        *(
            Arm(f'attn{t:g}', f"temperature {t:g} in slot attention's softmax", dict(attn_temperature=t))
            for t in (0.5, 0.2, 0.1, 0.05, 0.02)
        ),
    ],
    'recipe': [
        Arm('linear', 'the projection has one layer', dict(projection='linear')),
        Arm('torch-init', "PyTorch's initialization instead of Xavier's", dict(weight_init='torch')),
        Arm('div0', 'no slot diversity term', dict(diversity_weight=0.0)),
        Arm('div1', 'slot diversity weight 1', dict(diversity_weight=1.0)),
        Arm('learned', 'learned initial slots', dict(slot_init='learned')),
        Arm('kmeans', 'initial slots at k-means centers', dict(slot_init='kmeans')),
    ],
    'batch': [
        Arm('b16', 'batch 16, the same rate', dict(batch_size=16)),
        Arm('b16-lr2.8', 'batch 16, rate times the root of 8', dict(batch_size=16, lr=0.0004 * 8**0.5)),
        Arm('b16-lr8', 'batch 16, rate times 8', dict(batch_size=16, lr=0.0032)),
        Arm('b16-lr8-noclip', 'the same without clipping', dict(batch_size=16, lr=0.0032, clip_norm=1e9)),
        Arm(
            'b16-lr8-nowarm',
            'batch 16, rate times 8, clipped, without warm-up',
            dict(batch_size=16, lr=0.0032, warmup_epochs=0),
        ),
        Arm('b12-lr6', 'batch 12, rate times 6', dict(batch_size=12, lr=0.0024)),
    ],
    'slots': [Arm(f'k{k}', f'{k} slots', dict(num_slots=k)) for k in (3, 5, 7, 9, 13)],
    'features': [
        *(Arm(f'layer{n}', f'tokens of block {n} instead of the last', dict(layer=n)) for n in (2, 5, 8)),
        Arm('no-final-norm', 'the last block without the final norm', dict(final_norm=False)),
        *(Arm(f, f'the last block, its {f} instead of its token', dict(facet=f)) for f in ('query', 'key', 'value')),
    ],
    'resolution': [Arm('px448', '448 px, 1,024 patches', dict(resolution='448', grid_size='native'))],
    'collapse': [
        Arm('tied', 'the attention decoder, as narrow as the MLP decoder', SMALL),
        Arm('mlp', 'the MLP broadcast decoder', MLP),
        Arm('mlp-pos1', 'initial std of the positions 1 instead of 0.02', MLP | dict(pos_std=1.0)),
        Arm('mlp-slots0.1', 'initial std of the slots 0.1 instead of 1', MLP | dict(slot_std=0.1)),
        Arm('mlp-slots4', 'initial std of the slots 4', MLP | dict(slot_std=4.0)),
        Arm('mlp-hidden32', 'a quarter of the hidden width', MLP | dict(hidden_dim=32)),
        Arm('mlp-linear', 'the projection has one layer', MLP | dict(projection='linear')),
        Arm('mlp-kmeans', 'initial slots at k-means centers', MLP | dict(slot_init='kmeans')),
        Arm('mlp-warm', 'starts from the slot attention of the arm tied', MLP, needs='tied'),
        Arm('mlp-long', 'four times as long', MLP | dict(num_epochs=120)),
    ],
    'backbones': [Arm(b, f'the backbone {b}', dict(backbone=b)) for b in ('dino_vits16', 'clip_vitb16')],
    'long': [Arm('long', '200 epochs', dict(num_epochs=200))],
}
ARMS = {a.name: a for arms in QUESTIONS.values() for a in arms}
BATCHES = tuple(a.name for a in QUESTIONS['batch'])
# an arm that fails although its loss looks good: the healthy arm that it is compared with
FAILURES = {'mlp': 'tied', 'learned-target': 'none', 'learned-target-instance': 'base'}
PICTURES = (0, 8, 14)  # test scenes whose masks are kept, chosen by number before any training

CHOICES = (
    'normalizer',
    'projection',
    'attn_temperature',
    'mask_temperature',
    'weight_init',
    'diversity_weight',
    'slot_init',
)  # fields of `TrainConfig` whose default may change


def _improves(rows, arm, base):
    return all(paired(rows, arm, base, c).low > 0 for c in ('fg_ari_train', 'mbo_train'))


def winners(
    rows: pd.DataFrame,  # of `slotnb.study.collect`
) -> dict:  # field of `TrainConfig`: its value; fields that do not change are left out
    "The single changes that improve the masks of the training scenes."
    won, available = {}, set(rows.arm)
    for f in CHOICES:
        arms = [a for a in ARMS.values() if set(a.settings) == {f} and a.name in available]
        good = [a for a in arms if _improves(rows, a.name, 'base')]
        if good:
            won |= max(good, key=lambda a: rows[rows.arm == a.name].mbo_train.mean()).settings
    return won


def chosen_defaults(
    rows: pd.DataFrame,  # of `slotnb.study.collect`, with the arms best-long and long
) -> dict:  # like `winners`; empty if the long runs do not confirm them
    "The settings that become defaults of the library."
    return winners(rows) if _improves(rows, 'best-long', 'long') else {}
