"""Many runs at once against one after another: real training, with all its files, of default runs; the features are in memory.

python benchmarks/vectorize.py [--runs 12] [--epochs 1] [--repeats 5]
"""

import argparse, json, os, statistics, subprocess, sys, tempfile, time
from dataclasses import asdict
from measure import spread

SIDES = dict(  # processes, threads of each, and whether a process stacks its runs
    one_after_another=(1, 2, False),  # `fit` of each, as `slotnb train` would
    processes=(2, 1, False),  # `fit` of each, as `slotnb sweep` does, without its notebooks
    stacked=(1, 2, True),  # one stack of all
    vectorized=(2, 1, True),  # as `slotnb sweep --vectorize` does
)


def worker():
    "Train what comes by standard input, a list of configurations a line, and answer each line."
    import torch
    from slotnb import train
    from slotnb.fast import many_models as vectorize

    feats = torch.randn(60, 256, 384, generator=torch.Generator().manual_seed(0))
    part = lambda a, b: train.Batches(feats[a:b])
    data = train.RunData(part(0, 54), part(54, 60), None, part(0, 60), dict(dim=384, grid=[16, 16]), 1.0, {})
    for module in (train, vectorize):
        module.prepare = lambda *_: data
    stack = sys.argv[2] == 'True'
    print('ready', flush=True)
    for line in sys.stdin:
        configs = [train.TrainConfig(**c) for c in json.loads(line)]
        failed = vectorize.fit_many(configs, False) if stack else [train.fit(c, False) for c in configs] and {}
        print(json.dumps(failed), flush=True)


def start(processes, threads, stack):
    from slotnb.fast.many_models import KEEP_MEMORY

    env = (
        (KEEP_MEMORY if stack and processes > 1 else {})
        | os.environ
        | dict(  # as `vectorize` starts its workers
            OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads)
        )
    )
    p = subprocess.Popen(
        [sys.executable, __file__, '--worker', str(stack)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
    )
    assert p.stdout.readline() == 'ready\n'
    return p


def answer(process):
    "Wait until a process is done; a run may say something before that, a collapse for one."
    for line in process.stdout:
        if line.startswith('{'):
            assert line == '{}\n', line  # what failed and why
            return
    raise SystemExit('a process of the benchmark ended; its error stands above')


def losses(configs):
    return [float((c.run_dir / 'metrics.csv').read_text().splitlines()[-1].split(',')[1]) for c in configs]


def bench_vectorize(repeats=5, runs=12, epochs=1):
    "Sides take turns in processes that were started before and wait; seconds until the last of a side's processes has answered."
    from slotnb.runs.config import TrainConfig

    sides = {name: [start(*side) for _ in range(side[0])] for name, side in SIDES.items()}
    times, last = {name: [] for name in sides}, {}
    try:
        for turn in range(repeats + 1):  # the first is short and not counted
            for name, processes in sides.items():
                with tempfile.TemporaryDirectory() as folder:
                    plan = [
                        TrainConfig(
                            seed=i,
                            num_epochs=epochs,
                            warmup_epochs=1,
                            mask_temperature=(0.5, 1.0)[i % 2],
                            device='cpu',
                            save_dir=f'{folder}/{i}',
                        )
                        for i in range(runs if turn else 2)
                    ]
                    begin = time.perf_counter()
                    for i, p in enumerate(processes):
                        p.stdin.write(json.dumps([asdict(c) for c in plan[i :: len(processes)]]) + '\n')
                        p.stdin.flush()
                    for p in processes:
                        answer(p)
                    if turn:
                        times[name].append(time.perf_counter() - begin)
                    last[name] = losses(plan)
    finally:
        for processes in sides.values():
            for p in processes:
                p.stdin.close()
                p.wait()
    off = {name: max(abs(a / b - 1) for a, b in zip(l, last['one_after_another'])) for name, l in last.items()}
    assert max(off.values()) < 1e-3, off
    base = times['one_after_another']
    return dict(
        what=f"{runs} default runs of {epochs} epoch{'s' * (epochs > 1)}",
        runs=runs,
        epochs=epochs,
        train_images=54,
        largest_relative_difference_of_loss=max(off.values()),
        sides={
            name: dict(
                processes=SIDES[name][0],
                threads=SIDES[name][1],
                run_epochs_per_second=runs * epochs / statistics.median(t),
                ratio=spread([b / s for b, s in zip(base, t)]),
            )
            | spread(t)
            for name, t in times.items()
        },
    )


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']:
        worker()
        sys.exit()
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(runs=12, epochs=1, repeats=5).items():
        p.add_argument(f'--{name}', type=int, default=default)
    result = bench_vectorize(**vars(p.parse_args()))
    for name, side in result['sides'].items():
        print(
            f"{name:18} {side['processes']} x {side['threads']} threads: {side['median']:6.2f} s, {side['run_epochs_per_second']:.2f} run-epochs/s, {side['ratio']['median']:.2f}x"
        )
    print(f"losses differ by {result['largest_relative_difference_of_loss']:.1e} at most")
