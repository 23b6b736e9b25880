"""Does it learn the same? Runs of every engine and precision on the real features of the committed scenes, paired by
seed, scored on the test scenes.

A whole run by `fit` and `evaluate`, as anybody trains it. Two things are compared by the mean of the paired
differences and its 95 % interval."""

import tempfile
from pathlib import Path
from slotnb.core import has_bf16, default_device
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.inputs import prepare
from slotnb.study import Arm, collect, paired, plan_study, run_study

DATA = Path(__file__).parent.parent / 'data/movi_a_subset'
MODELS = dict(default={}, mlp=dict(decoder='mlp', num_slots=7, slot_dim=64, hidden_dim=64))
SCORES = ('test_fvu', 'fg_ari_attn', 'ari_attn', 'mbo_attn')


def first_scenes(folder, n):
    "A data_dir in `folder` with links to the first scenes of each split."
    for split in ('train', 'test'):
        (Path(folder) / split).mkdir()
        for scene in sorted((DATA / split).glob('scene_*'))[:n]:
            (Path(folder) / split / scene.name).symlink_to(scene.resolve())
    return folder


def bench_quality(small=False, device='cpu', seeds=5, num_epochs=8, progress=lambda text: None):
    "Scores of every arm and seed, and the paired differences from the default engine in fp32."
    precisions = ('fp32', 'bf16') if has_bf16(default_device(device)) else ('fp32',)
    if small:
        seeds, num_epochs = 2, 1
    rows, differences = [], []
    for model, settings in MODELS.items():
        arms = [
            Arm(f'{model}-{engine}-{precision}', '', settings | dict(engine=engine, train_precision=precision))
            for engine in ('torch', 'fast')
            for precision in precisions
        ]
        progress(f'{len(arms) * seeds} runs of the model {model}')
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as few:
            data_dir = str(first_scenes(few, 8) if small else DATA)
            few_epochs = dict(num_epochs=num_epochs, warmup_epochs=min(5, num_epochs - 1))
            base = PRESETS['version_0_1'] | dict(data_dir=data_dir, device=device) | few_epochs
            prepare(TrainConfig(**base), show_progress=False)  # features are cached before processes start
            plan = plan_study(arms, range(seeds), folder, **base)
            failed = run_study(plan, workers=1 if small else 0, show_progress=False)
            assert not failed, failed
            table = collect(plan)
        rows += table[['arm', 'seed', 'train_mse', 'engine', *SCORES]].to_dict('records')
        for arm in arms[1:]:
            d = {k: paired(table, arm.name, arms[0].name, k) for k in SCORES}
            differences.append(
                dict(arm=arm.name, base=arms[0].name, seeds=seeds)
                | {k: dict(difference=v.mean, interval=v.half) for k, v in d.items()}
            )
    return dict(num_epochs=num_epochs, rows=rows, paired=differences)
