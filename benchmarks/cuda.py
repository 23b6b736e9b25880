"""The same comparisons on a GPU: what a step, an epoch, many runs and features take there, and what the models are worth that were trained so.

steps       a step against the same equations written plainly: time, memory, FLOPs, share of the GPU's peak
epoch       one pass over 60 scenes whose features are on the device, and a look at the held-out ones
many        15 runs in one stack against one after another, each with all its files
features    images per second of DINOv2 ViT-S/14, and the error of bfloat16
quality     2,000 steps from the same start, paired over five seeds: loss curves, FG-ARI, ARI, mBO

python benchmarks/cuda.py [--only steps epoch] [--small --device cpu] [--out benchmarks/cuda.json]

A part that is done is written at once; parts that are not asked for keep what they were. The other side of `steps` and `quality` is that of run.py.
"""

import argparse, copy, statistics, tempfile, time
from dataclasses import replace
from pathlib import Path
import torch
from tqdm import tqdm
from measure import alternate, flops, machine, peak_bytes
from quality import DATA, bench_quality
from run import SMALL_SIZE
from steps import CLIP, DIVERSITY, LR, SIZES, gradient_gaps, models, ours_forward, step_sides, as_calls
from slotnb.backbones import ViTBackbone
from slotnb.core import read_json, write_json
from slotnb.data import KubricFolders
from slotnb.normalizer import Normalizer
from slotnb.report import paired_table, speed_table
from slotnb.train import TrainStep, make_optimizer
from slotnb.runs.config import TrainConfig
from slotnb.train import build, fit, validate, train_epoch
from slotnb.runs.inputs import prepare
from slotnb.fast.many_models import fit_many

NARROW = dict(slot_dim=16, hidden_dim=16)
PRECISIONS = ('fp32', 'bf16')


def wait(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def several(f, count, device):
    "So many calls, and the GPU has done them all."

    def run():
        for _ in range(count):
            f()
        wait(device)

    return run


def each(times, count):
    "Of one call."
    return {
        name: t
        | {k: t[k] / count for k in ('median', 'processor')}
        | dict(quartiles=[q / count for q in t['quartiles']])
        for name, t in times.items()
    }


def peak_of(f, device):
    "Bytes of tensors that live at the same time at most while `f` runs, beyond those that lived before."
    if device.type != 'cuda':
        return peak_bytes(f)
    wait(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    f()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


def joules_of(f, seconds, device):
    "Energy of one call by the GPU's own counter, over a second of calls; None where it cannot be read."
    try:
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        count = max(1, round(1 / seconds))
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        several(f, count, device)()
        return (pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before) / 1000 / count
    except Exception:
        return None  # no such library, or no such counter


def peaks(device, n=8192, repeats=5):
    "The most FLOP/s that a large matrix product reaches, and the bytes/s of a large copy, read and written."
    if device.type != 'cuda':
        n = 256
    found = {}
    for name, dtype, tf32 in (
        ('fp32', torch.float32, False),
        ('tf32', torch.float32, True),
        ('bf16', torch.bfloat16, False),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a = torch.randn(n, n, device=device, dtype=dtype)
        found[name] = 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(repeats))
    torch.backends.cuda.matmul.allow_tf32 = False
    x = torch.randn(2**29 if device.type == 'cuda' else 2**16, device=device)
    y = torch.empty_like(x)
    return found | dict(
        bytes_per_second=2 * x.nbytes / min(seconds(lambda: y.copy_(x), device) for _ in range(repeats))
    )


def seconds(f, device):
    wait(device)
    start = time.perf_counter()
    f()
    wait(device)
    return time.perf_counter() - start


def steps(small, device):
    "One row a size, as run.py has them; without a graph where memory is measured, because a graph's is its own."
    (repeats, count), rows, peak = (2, 1) if small else (9, 20), [], peaks(device)
    for name, size in SIZES.items():
        if 'threads' in size or 'narrow' in name:
            continue
        if small:
            size = SMALL_SIZE | dict(decoder=size['decoder'])
        plain, ours, feats, noise = models(**size)
        counted = {n: flops(as_calls(f)) for n, f in step_sides(plain, ours, feats, noise, PRECISIONS).items()}
        plain, ours, feats, noise = (t.to(device) for t in (plain, ours, feats, noise))
        gaps = gradient_gaps(plain, ours, feats, noise, PRECISIONS)
        assert all(gap['gradients'] < dict(fp32=1e-4, bf16=0.1)[p] for p, gap in gaps.items()), gaps
        sides = step_sides(plain, ours, feats, noise, PRECISIONS)
        for f in sides.values():
            several(f, 5, device)()  # Adam has its moments, graphs are recorded
        times = each(alternate({n: several(f, count, device) for n, f in sides.items()}, repeats), count)
        with torch.no_grad():
            forward = each(
                alternate(
                    {
                        n: several(f, count, device)
                        for n, f in {
                            'plain': lambda: plain(feats, noise),
                            'fp32': lambda: ours_forward(ours, feats, noise),
                        }.items()
                    },
                    repeats,
                ),
                count,
            )
        memory = {'plain': peak_of(sides['plain'], device)}
        for p in PRECISIONS:
            step = TrainStep(copy.deepcopy(ours), None, DIVERSITY, CLIP, p)
            step.opt = make_optimizer(step.params, LR)
            step.graphed.warmup = 10**9
            one = lambda: step(feats, noise, LR)
            one()
            memory[p] = peak_of(one, device)
        rows.append(
            dict(
                size=name,
                threads=1,
                **size,
                step=times,
                forward=forward,
                peak_bytes=memory,
                flops=counted,
                gaps=gaps,
                share_of_peak={
                    n: counted[n] / times[n]['median'] / peak['bf16' if n == 'bf16' else 'fp32'] for n in sides
                },
                joules={n: joules_of(f, times[n]['median'], device) for n, f in sides.items()},
            )
        )
        del plain, ours, sides, step
    return dict(gemm_peak=peak, rows=rows)


EPOCHS = {'default model': {}, "papers' sizes": dict(decoder='mlp', num_slots=7, slot_dim=256, hidden_dim=1024)}


def epoch(small, device):
    "Seconds of one pass over all 60 training scenes at batch 2, and of looking at the six held-out ones."
    config = TrainConfig(data_dir=DATA, device=str(device))
    data = prepare(config, False)
    norm, rows = Normalizer(config.normalizer).fit(data.train), []
    feats, val = norm(data.train_and_val[: 4 if small else len(data.train_and_val)]).to(device), norm(data.val[:]).to(device)
    for name, other in EPOCHS.items():
        for precision in PRECISIONS:
            c = replace(config, **other | (NARROW if small else {}))
            model = build(c, 384, 256).to(device)
            step, times, held_out = (
                TrainStep(model, make_optimizer(model.parameters(), c.lr), c.diversity_weight, c.clip_norm, precision),
                [],
                [],
            )
            for e in range(3 if small else 15):
                times.append(seconds(lambda: train_epoch(step, feats, c, e), device))
                held_out.append(seconds(lambda: validate(model, val, c.seed), device))
            rows.append(
                dict(
                    model=name,
                    precision=precision,
                    images=len(feats),
                    batch_size=c.batch_size,
                    train=statistics.median(times[2:]),
                    slowest=max(times[2:]),
                    held_out=statistics.median(held_out[2:]),
                )
            )
    return rows


def training_epoch(configs):
    "Seconds of an epoch's training steps, all of these runs together."
    return sum(
        statistics.median(float(l.split(',')[1]) for l in (c.run_dir / 'timing.csv').read_text().splitlines())
        for c in configs
    )


def many(small, device):
    "15 runs in a stack against one after another: of the latter two are trained, and their seconds are what the others would take too."
    runs, epochs, turns, rows = (2, 2, 1, []) if small else (15, 100, 2, [])
    for precision in PRECISIONS:

        def plan(folder, count):
            return [
                TrainConfig(
                    data_dir=DATA,
                    device=str(device),
                    seed=i,
                    num_epochs=epochs,
                    warmup_epochs=1,
                    mask_temperature=(0.5, 1.0)[i % 2],
                    train_precision=precision,
                    save_dir=f'{folder}/{i}',
                    **NARROW if small else {},
                )
                for i in range(count)
            ]

        took = dict(two_alone=[], stack=[])
        for turn in range(turns + 1):  # the first is not counted
            with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
                alone, together = plan(a, 2), plan(b, runs)
                t = (
                    seconds(lambda: [fit(c, False) for c in alone], device),
                    seconds(lambda: fit_many(together, False), device),
                )
                if turn:
                    took['two_alone'].append(t[0])
                    took['stack'].append(t[1])
                assert all(len((c.run_dir / 'metrics.csv').read_text().splitlines()) == epochs + 1 for c in together)
                training = dict(alone=training_epoch(alone) / 2, stack=training_epoch(together))
        row = dict(
            precision=precision,
            runs=runs,
            epochs=epochs,
            train_images=54,
            seconds=took,
            alone_epoch=statistics.median(took['two_alone']) / 2 / epochs,
            training_epoch=training,
        )
        rows.append(
            row
            | dict(
                in_the_time_of=statistics.median(s / a * 2 for a, s in zip(*took.values())),
                times_one_after_another=statistics.median(a / 2 * runs / s for a, s in zip(*took.values())),
            )
        )
    return rows


def features(small, device):
    "The library's forward pass in fp32 against ours, which is the library's with its weights in bfloat16."
    images = torch.stack([torch.tensor(s.image).permute(2, 0, 1) for s in KubricFolders(DATA, 'test')])[
        : 2 if small else 24
    ]
    exact, fast = (ViTBackbone('dinov2_vits14', device=str(device), precision=p) for p in PRECISIONS)
    x = exact.preprocess(images)
    want, got = exact.tokens(x), fast.tokens(x)
    rows = []
    for batch in (2,) if small else (8, 24, 240):
        y = x.repeat(-(-batch // len(x)), 1, 1, 1)[:batch]
        times = each(
            alternate(
                {
                    'library': several(lambda: exact.tokens(y), 1 if small else 5, device),
                    'bf16': several(lambda: fast.tokens(y), 1 if small else 5, device),
                },
                2 if small else 7,
            ),
            1 if small else 5,
        )
        rows += [
            dict(batch=batch, side=n, images_per_second=batch / t['median'], times_library=t['ratio'])
            for n, t in times.items()
        ]
    return dict(
        backbone='dinov2_vits14',
        weights=str(exact.weights),
        error=((got - want).norm() / want.norm()).item(),
        rows=rows,
    )


def quality(small, device):
    return bench_quality(
        *((4, 2) if small else (2000, 5)),
        small=small,
        progress=lambda text: print(text, flush=True),
        device=str(device),
        only=[f'{m}-{s}' for m in ('default', 'mlp') for s in ('plain', 'fp32', 'bf16')],
    )


PARTS = dict(steps=steps, epoch=epoch, many=many, features=features, quality=quality)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        '--only',
        nargs='+',
        choices=PARTS,
        default=list(PARTS),
        metavar='PART',
        help=f'some of {", ".join(PARTS)}; default: all',
    )
    p.add_argument('--device', default='cuda', help='cpu is for --small alone')
    p.add_argument('--small', action='store_true', help='tiny sizes: that everything runs; the times mean nothing')
    p.add_argument('--out', default=str(Path(__file__).parent / 'cuda.json'), help='where the numbers go')
    args = p.parse_args()
    out, device = Path(args.out), torch.device(args.device)
    result = read_json(out) if out.exists() else {}
    with tqdm(args.only, unit='part') as bar:
        for name in bar:
            bar.set_description(name)
            start = time.perf_counter()
            found = PARTS[name](args.small, device)
            result[name] = dict(
                machine=machine() | dict(date=time.strftime('%Y-%m-%d')),
                seconds=time.perf_counter() - start,
                small=args.small,
                result=found,
            )
            write_json(out, result)
    if 'steps' in args.only:
        print(speed_table(result).to_string(), '\n')
    for name in ('epoch', 'many'):
        for row in result[name]['result'] if name in args.only else []:
            print(name, row)
    if 'features' in args.only:
        print('features', result['features']['result'], '\n')
    if 'quality' in args.only:
        print(paired_table(result).to_string())
    print(f'\nall numbers: {out}')


if __name__ == '__main__':
    main()
