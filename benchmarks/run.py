"""Speed with its quality: every part compares two sides in one process and in turns, and says what came out the same.

steps       a training step and a forward pass against the same equations written plainly, one thread and all cores: time, memory, FLOPs, share of the processor's peak
quality     2,000 steps on real features from the same start, paired over five seeds: loss curves, FG-ARI, ARI, mBO
vectorize   many runs as one program against one after another
extraction  images per second of the backbones against the libraries' own forward pass
scale       time and memory against the number of scenes, patches and slots

python benchmarks/run.py [--only steps quality] [--small] [--out benchmarks/result.json]

A part that is done is written at once; parts that are not asked for keep what they were. The plain models of `quality` are trained once: as long as their
code, features, libraries and kind of processor are those of the file, their scores stay (`--fresh` trains them again).
"""

import argparse, json, sys, time
from pathlib import Path
import torch
from tqdm import tqdm
from measure import machine
from slotnb.core import read_json, write_json
from slotnb.report import TRAINED, speed_table, throughput_table

HERE = Path(__file__).parent
SMALL_SIZE = dict(slots=3, slot_dim=16, patches=16, hidden=24, batch=2)


def steps(small, progress, before):
    from steps import AFTER_TRAINING, SIZES, bench_steps

    if small:
        return bench_steps(
            0,
            {name: SMALL_SIZE | dict(decoder=SIZES[name]['decoder']) for name in TRAINED.values()},
            (AFTER_TRAINING[0], SMALL_SIZE | dict(decoder='mlp', trained=2)),
            progress,
            True,
        )
    return bench_steps(8, progress=progress)


def quality(small, progress, before):
    from quality import bench_quality

    return bench_quality(*((4, 2) if small else (2000, 5)), small, progress, before=before)


def vectorize(small, progress, before):
    from vectorize import bench_vectorize

    return bench_vectorize(*(2, 3, 1) if small else ())


def extraction(small, progress, before):
    from extraction import bench_extraction

    return bench_extraction(9, small=small, progress=progress)


def scale(small, progress, before):
    from scale import figure, scale_all

    results = scale_all(*((4, 6), (16, 32, 64), (2, 4, 8), 3, 16) if small else ())
    if not small:
        figure(results, HERE / 'scale.png')
    return results


THREADS = dict(
    steps='1, and all cores in rows that say so', quality='1 in each of 2 processes'
)  # where a part sets its own
PARTS = dict(steps=steps, quality=quality, vectorize=vectorize, extraction=extraction, scale=scale)


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
    p.add_argument(
        '--threads',
        type=int,
        default=torch.get_num_threads(),
        help='of each side, where a part does not say its own; default: what torch takes here (%(default)s)',
    )
    p.add_argument(
        '--small',
        action='store_true',
        help='tiny sizes: that everything runs and both sides agree; the times mean nothing',
    )
    p.add_argument(
        '--fresh',
        action='store_true',
        help='train the plain models of `quality` too where nothing that they depend on has changed',
    )
    p.add_argument('--out', default=str(HERE / 'result.json'), help='where the numbers go')
    args = p.parse_args()
    out = Path(args.out)
    result = read_json(out) if out.exists() else {}
    with tqdm(args.only, unit='part') as bar:
        for name in bar:
            torch.set_num_threads(args.threads)
            about, start = machine() | dict(date=time.strftime('%Y-%m-%d')), time.perf_counter()
            about['threads'] = THREADS.get(name, args.threads)
            bar.set_description(name)
            found = PARTS[name](
                args.small,
                lambda text: bar.set_postfix_str(text),
                None if args.fresh else result.get(name, {}).get('result'),
            )
            result[name] = dict(machine=about, seconds=time.perf_counter() - start, small=args.small, result=found)
            write_json(out, result)
    if 'steps' in result:
        print(speed_table(result).to_string(), '\n')
    if {'steps', 'quality'} <= result.keys():
        print(throughput_table(result).to_string())
    print(f'\nall numbers: {out}')


if __name__ == '__main__':
    main()
