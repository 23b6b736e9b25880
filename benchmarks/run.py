"""Speed and quality of the engines: every part compares sides in one process and in turns.

steps       a training step of the papers' code, of the default engine and of the fast one: time, speed-up, peak memory
quality     whole runs of each engine on real features, paired over five seeds: FVU, FG-ARI, ARI, mBO
extraction  images per second of a backbone in fp32 and bf16
scale       time and memory of a run against the number of scenes
gpu         on a GPU: seconds per epoch, and many runs as one stack

python benchmarks/run.py [--only steps quality] [--small] [--device cuda]

Results go to benchmarks/results/<machine>.json. A finished part is written at once; parts that were not asked for
keep their results."""

import argparse
import time
from pathlib import Path
import torch
from tqdm import tqdm
from extraction import bench_extraction
from gpu import bench_gpu
from measure import machine, machine_name
from quality import bench_quality
from scale import bench_scale
from slotnb.core import read_json, write_json
from slotnb.speed import speed_table
from steps import bench_steps

PARTS = dict(steps=bench_steps, quality=bench_quality, extraction=bench_extraction, scale=bench_scale, gpu=bench_gpu)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--only', nargs='+', choices=PARTS, metavar='PART', help=f'some of {", ".join(PARTS)}')
    p.add_argument('--small', action='store_true', help='tiny sizes: that everything runs; times mean nothing')
    p.add_argument('--device', default='cpu', help='cpu or cuda')
    p.add_argument('--out', help='the file of results; default: results/<machine>.json')
    args = p.parse_args()
    out = Path(args.out or Path(__file__).parent / f'results/{machine_name(machine())}.json')
    result, threads = read_json(out) if out.exists() else {}, torch.get_num_threads()
    names = args.only or [name for name in PARTS if name != 'gpu' or args.device != 'cpu']
    with tqdm(names, unit='part') as bar:
        for name in bar:
            bar.set_description(name)
            torch.set_num_threads(threads)
            about, start = machine(), time.perf_counter()
            found = PARTS[name](args.small, args.device, progress=bar.set_postfix_str)
            seconds = time.perf_counter() - start
            result[name] = dict(machine=about, seconds=seconds, small=args.small, result=found)
            write_json(out, result)
    if 'steps' in result:
        print(speed_table(result).to_string())
    print(f'\nall numbers: {out}')


if __name__ == '__main__':
    main()
