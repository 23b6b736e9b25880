"""The command `python reports/claims`: train what is missing, measure, write the tables and the pages.

Finished runs are kept, so an interrupted command resumes. A backbone without weights is recorded as not measured.
"""

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
import torch
import tyro
from tqdm import tqdm
from slotnb.core import SlotnbError, cache_dir, default_device, write_json
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.config import TrainConfig
from slotnb.runs.identity import versions
from slotnb.runs.inputs import frozen_backbone
from slotnb.runs.verify import verified, write_table
from slotnb.study import Arm, collect, curves, plan_study, run_study
from slotnb.sweep import score_floors
from claims.evidence import Evidence
from claims.measures import calibration_rows, feature_rows, object_rows, scene_rows, temperature_rows
from claims.pages import build_pages, pages_of
from claims.protocol import PICTURES, QUESTIONS, RECIPE, winners
from claims.times import time_rows
from claims.verdicts import claims_table


@dataclass(frozen=True)
class ClaimsConfig:
    "Test the claims of the source report: train the arms, write the tables, the verdicts and their pages."

    out: str = 'reports/claims'  # gets the tables: .csv, .json and some masks
    runs_dir: str = 'runs/claims'  # each run goes to runs_dir/arm-seed/backbone
    only: tuple[str, ...] = ()  # questions, for example normalization slots; empty is all
    seed: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds of every arm
    num_epochs: int = 30  # of each run; the long arms have more in proportion, 120 and 200 of 30
    data_dir: str = 'data/movi_a_subset'  # with the splits train and test, both with masks and materials
    pages: str = 'reports/_build'  # the executed notebooks, one HTML file each; '' makes none
    workers: int = 0  # processes; 0 is one per core on a CPU and one on a GPU
    device: str = 'auto'  # auto, cpu or cuda
    engine: str = 'torch'  # torch, or fast: on a GPU, runs of the same shape then train as one program


def chosen_arms(
    config: ClaimsConfig,
) -> list[Arm]:
    "The arms of the questions in `config.only`, `base` first. The longer runs keep their factor."
    for q in config.only:
        if q not in QUESTIONS:
            raise SlotnbError(f"question '{q}' is unknown; choose one of {', '.join(QUESTIONS)}")
    arms = [a for q, group in QUESTIONS.items() if not config.only or q in config.only or q == 'base' for a in group]

    def scaled(settings):
        if 'num_epochs' not in settings:
            return settings
        return settings | dict(num_epochs=config.num_epochs * settings['num_epochs'] // ClaimsConfig.num_epochs)

    return [replace(a, settings=scaled(a.settings)) for a in arms]


def _with_weights(arms, base):
    "The arms whose backbone has weights, and why the others are not measured."
    available, missing = [], {}
    for a in arms:
        try:
            if 'backbone' in a.settings:
                frozen_backbone(TrainConfig(**(base | a.settings)))
            available.append(a)
        except SlotnbError as e:
            if not str(e).startswith('no weights'):
                raise
            missing[a.name] = str(e).replace(str(cache_dir()), '$SLOTNB_CACHE')
            tqdm.write(f'NOT MEASURED {a.name}: {e}')
    return available, missing


def _train(plan, config, base, show_progress):
    "Train the plan, and then the winners together (`best`, `best-long`), which are added to it."
    failed = run_study(plan, config.workers, show_progress)
    if 'long' in plan and (won := winners(collect(plan))):
        best = [
            Arm('best', 'all settings that improve the training scenes', won),
            Arm('best-long', 'the same for 200 epochs', won | dict(num_epochs=plan['long'][0].num_epochs)),
        ]
        more = plan_study(best, config.seed, config.runs_dir, **base)
        plan |= more
        failed |= run_study(more, config.workers, show_progress)
    return failed


def _write_tables(plan, arms, config, base, show_progress):
    own_features = {'layer', 'facet', 'final_norm', 'resolution', 'backbone'}
    sets = [a for a in arms if a.name == 'base' or own_features & set(a.settings)]
    first, seeds, out = plan['base'][0], config.seed[:3], Path(config.out)
    tables = dict(
        runs=lambda: collect(plan),
        curves=lambda: curves(plan),
        temperatures=lambda: temperature_rows(plan),
        calibration=lambda: calibration_rows(plan),
        objects=lambda: object_rows(plan),
        scenes=lambda: scene_rows(plan),
        features=lambda: feature_rows(sets, base, seeds, show_progress),
        floors=lambda: score_floors(first.backbone, first, list(seeds), show_progress),
    )
    for name, make in tqdm(tables.items(), 'tables', disable=not show_progress):
        write_table(out / f'{name}.csv', make(), index=False, float_format='%.6g')
    write_json(out / 'times.json', time_rows(first))
    masks = {}  # the decoder's masks of a few test scenes, first seed of each arm, for the figures
    for arm, (c, *_) in plan.items():
        if (c.run_dir / 'study.json').exists():
            masks[arm] = load_tensors(verified(c.run_dir / 'test_masks.safetensors'))[0]['masks'][list(PICTURES)].half()
    save_tensors(out / 'masks.safetensors', masks, scenes=PICTURES)


def measure_claims(
    config: ClaimsConfig,
    show_progress: bool = True,
) -> dict[str, str]:  # run folder: why it failed
    "Train, measure and write the tables."
    base = RECIPE | dict(
        data_dir=config.data_dir,
        num_epochs=config.num_epochs,
        warmup_epochs=min(5, config.num_epochs - 1),
        device=config.device,
        engine=config.engine,
    )
    start, clock = time.perf_counter(), Path(config.runs_dir) / 'seconds.txt'
    arms, missing = _with_weights(chosen_arms(config), base)
    plan = plan_study(arms, config.seed, config.runs_dir, **base)
    try:
        failed = _train(plan, config, base, show_progress)
    finally:  # the time of an interrupted command counts
        clock.parent.mkdir(parents=True, exist_ok=True)
        with open(clock, 'a') as f:
            f.write(f'{time.perf_counter() - start:.0f}\n')
    start = time.perf_counter()
    _write_tables(plan, arms, config, base, show_progress)
    seconds = sum(map(float, clock.read_text().split())) + time.perf_counter() - start
    machine = dict(
        platform=platform.platform(),
        cores=os.cpu_count(),
        torch_uses=torch.backends.cpu.get_cpu_capability(),
        device=str(default_device(config.device)),
    )
    provenance = dict(
        config=asdict(config),
        base=asdict(plan['base'][0]) | dict(save_dir='', data_dir=''),
        missing=missing,
        failed=failed,
        versions=versions(),
        date=time.strftime('%Y-%m-%d'),
        machine=machine,
        seconds=seconds,
    )
    write_json(Path(config.out) / 'provenance.json', provenance)
    return failed


def main(
    args: list[str] | None = None,  # the command line; None is the process's own
) -> int:  # exit code: 0 success, 1 some runs failed, 2 user error, 130 interrupted
    "Entry point of `python reports/claims`."
    config = tyro.cli(ClaimsConfig, prog='python reports/claims', args=args, use_underscores=True)
    try:
        failed = measure_claims(config)
        table = claims_table(Evidence.read(config.out))
        print('\n'.join(f'{r.claim}: {r.verdict.upper()}. {r.why}' for r in table.itertuples()))
        if config.pages:
            print(*build_pages(config.out, config.pages, pages_of(config.only)), sep='\n')
    except SlotnbError as e:
        print(f'claims: {e}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('claims: interrupted; the same command resumes from the last saved state', file=sys.stderr)
        return 130
    for folder, why in failed.items():
        print(f'FAILED {folder}: {why} (see failed.json there)', file=sys.stderr)
    if failed:
        print(f'{len(failed)} runs failed; the same command tries them again', file=sys.stderr)
    return int(bool(failed))
