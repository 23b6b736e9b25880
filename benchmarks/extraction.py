"""Extraction: images/s of each backbone against its floor, and what the faster numbers cost; all sides take turns in one process.

python benchmarks/extraction.py [--repeats 15] [--batch 8] [--threads 2] [--out benchmarks/extraction.json]
"""

import argparse, json, platform, statistics, time, warnings
from pathlib import Path
import torch
from measure import alternate, flops, precisions
from slotnb.backbones import BACKBONES, ViTBackbone
from slotnb.baselines import kmeans_masks
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders
from slotnb.metrics import evaluate_masks
from slotnb.products import linear

DATA = Path(__file__).parent.parent / 'data/movi_a_subset'
LIMIT = dict(bf16=0.01, int8=0.01)  # relative error of real features


def product(dtype, n=1536):
    a = torch.randn(n, n).to(dtype)
    return (lambda: a @ a, lambda: linear(a, a)), 2 * n**3 / 1e9  # two libraries in fp32 (`01_products`)


def sides_of(name, weights, x):
    "The library's own forward in fp32, and ours by precision; those that cannot be had here are left out and said."
    exact, ours, missing = ViTBackbone(name, weights), {}, {}
    net = exact.net

    @torch.no_grad()
    def library():
        return net.forward_features(x) if hasattr(net, 'forward_features') else net(x)

    for p in ('fp32', 'bf16', 'int8'):
        if p != 'fp32' and 'bf16' not in precisions():
            missing[p] = f'{p}: this CPU has no units for bfloat16'
            continue
        try:
            ours[p] = exact if p == 'fp32' else ViTBackbone(name, weights, precision=p)
        except SlotnbError as e:
            missing[p] = str(e)
    return exact, library, ours, missing


def rel(got, want):
    return ((got - want).norm() / want.norm()).item()


def speed(name, weights, images, batch, repeats, threads):
    "One backbone at its report's size."
    x = ViTBackbone(name, weights).preprocess(images[:batch])
    exact, library, ours, missing = sides_of(name, weights, x)
    gflop = flops(library) / 1e9 / batch
    gemm = {k: product(d) for k, d in dict(fp32=torch.float32, bf16=torch.bfloat16).items() if k in precisions()}
    sides = (
        {'library': library}
        | {k: (lambda b=b: b.tokens(x)) for k, b in ours.items()}
        | {f'gemm {k} {i}': f for k, (ways, _) in gemm.items() for i, f in enumerate(ways)}
    )
    times = alternate(sides, repeats)
    peak = {
        k: gflop_of_it / min(times[f'gemm {k} {i}']['median'] for i in range(len(ways)))
        for k, (ways, gflop_of_it) in gemm.items()
    }  # GFLOP/s
    all_images = exact.preprocess(images)
    want = exact.tokens(all_images)
    rows = []
    for k in ('library', *ours):
        t, units = times[k], 'bf16' if k in ('bf16', 'int8') else 'fp32'
        row = dict(
            side=k,
            record='library, eager fp32' if k == 'library' else ours[k].record['precision'],
            images_per_second=batch / t['median'],
            seconds=t,
            processor_seconds_an_image=t['processor'] / batch,
            times_library=t['ratio'],
            times_library_by_processor_seconds=times['library']['processor'] / t['processor'],
            share_of_floor=gflop * batch / peak[units] / t['median'],
            floor_units=units,
        )
        if k in ('bf16', 'int8'):
            got = ours[k].tokens(all_images)
            row |= dict(error=rel(got, want), largest_error_of_an_image=max(rel(g, w) for g, w in zip(got, want)))
            if weights != 'random':
                assert row['error'] < LIMIT[k], row
        rows.append(row)
    return dict(
        backbone=name,
        weights=str(exact.weights),
        batch=batch,
        threads=threads,
        resolution=list(exact.resolution),
        gflop_an_image=gflop,
        gemm_gflops=peak,
        missing=missing,
        sides=rows,
    )


def quality(name, scenes, images, seeds=(0, 1, 2)):
    "Masks of k-means on fp32 features against those on faster ones: differences scene by scene, in points, and what another seed of k-means changes."
    exact = ViTBackbone(name)

    def score(feats, seed):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return (
                evaluate_masks(scenes, [kmeans_masks(f, seed=seed) for f in feats], 'km', exact.grid)[
                    ['fg_ari_km', 'ari_km', 'mbo_km']
                ]
                * 100
            )

    want = exact(images)
    base = [score(want, s) for s in seeds]
    result = dict(
        fp32={
            k[:-3]: dict(
                mean=float(sum(b[k].mean() for b in base) / len(seeds)),
                std_over_seeds=statistics.stdev(float(b[k].mean()) for b in base),
            )
            for k in base[0]
        }
    )
    for p in ('bf16', 'int8') if 'bf16' in precisions() else ():
        try:
            got = ViTBackbone(name, precision=p)(images)
        except SlotnbError:
            continue
        pairs = [score(got, s) - b for s, b in zip(seeds, base)]
        result[p] = {
            k[:-3]: dict(
                difference=float(sum(d[k].mean() for d in pairs) / len(seeds)),
                by_seed=[float(d[k].mean()) for d in pairs],
                std_over_scenes=float(sum(pairs)[k].std() / len(seeds)),
                standard_error=float(sum(pairs)[k].std() / len(seeds) / len(scenes) ** 0.5),
            )
            for k in pairs[0]
        }
    return result


def bench_extraction(
    repeats: int = 15,  # how often each side runs; a third of that with random weights, whose time is all that counts
    batch: int = 8,  # images a forward pass
    threads: int | None = None,  # of torch; None: as it is
    small: bool = False,  # two images of the first backbone and no masks: a trial
    progress=lambda text: None,  # told what is being measured
) -> dict:  # what, machine-free; `backbones` and `quality`
    "All that is measured, as a dict."
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        scenes = list(KubricFolders(DATA, 'test'))
        if small:
            scenes, repeats, batch = scenes[:2], 2, 2
        images, rows = torch.stack([torch.tensor(s.image).permute(2, 0, 1) for s in scenes]), []
        for name in list(BACKBONES)[
            : 1 if small else None
        ]:  # the values of weights do not change how long a product takes
            progress(name)
            real = ViTBackbone(name).weights if name == 'dinov2_vits14' else None
            weights = 'auto' if real and real.path else 'random'
            rows.append(
                speed(
                    name,
                    weights,
                    images,
                    batch,
                    repeats if weights == 'auto' else max(2, repeats // 3),
                    torch.get_num_threads(),
                )
            )
        real = rows[0]['weights'] != 'RANDOM WEIGHTS'
        return dict(what='extraction', backbones=rows) | (
            dict(quality=quality('dinov2_vits14', scenes, images)) if real and not small else {}
        )
    finally:
        torch.set_num_threads(before)


def table(result) -> str:
    "As text."
    lines = [
        f"{'backbone':15}{'weights':9}{'side':9}{'images/s':>9}{'x library':>10}{'by CPU s':>9}{'of floor':>9}{'error':>9}{'largest':>9}"
    ]
    for b in result['backbones']:
        for s in b['sides']:
            error = f"{s['error']:9.2%}{s['largest_error_of_an_image']:9.2%}" if 'error' in s else ''
            lines.append(
                f"{b['backbone']:15}{'RANDOM' if b['weights'] == 'RANDOM WEIGHTS' else 'real':9}{s['side']:9}{s['images_per_second']:9.1f}{s['times_library']['median']:10.2f}"
                f"{s['times_library_by_processor_seconds']:9.2f}{s['share_of_floor']:9.0%}" + error
            )
        lines += [
            f'  {b["backbone"]}: {b["gflop_an_image"]:.1f} GFLOP an image, products at {", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in b["gemm_gflops"].items())}',
            *(f'  left out: {why}' for why in b['missing'].values()),
        ]
    for p, q in result.get('quality', {}).items():
        lines.append(
            f'k-means, {p}: '
            + ', '.join(
                f"{k} {v['mean']:.1f} +- {v['std_over_seeds']:.1f} over seeds"
                if p == 'fp32'
                else f"{k} {v['difference']:+.2f} +- {v['standard_error']:.2f}"
                for k, v in q.items()
            )
        )
    return '\n'.join(lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        '--repeats', type=int, default=15, help='how often each side runs; a third of that with random weights'
    )
    p.add_argument('--batch', type=int, default=8, help='images a forward pass')
    p.add_argument('--threads', type=int, help='of torch; left out: as many as it takes by itself')
    p.add_argument('--out', default='benchmarks/extraction.json', help='where the numbers go')
    args = p.parse_args()
    result = bench_extraction(args.repeats, args.batch, args.threads)
    machine = dict(
        processor=platform.processor() or platform.machine(),
        torch=torch.__version__,
        capability=torch.backends.cpu.get_cpu_capability(),
        bf16=torch.cpu._is_avx512_bf16_supported(),
        amx=torch.cpu._is_amx_tile_supported(),
    )
    print(table(result))
    Path(args.out).write_text(json.dumps(dict(machine=machine) | result, indent=1) + '\n')


if __name__ == '__main__':
    main()
