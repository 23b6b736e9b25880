"""How many threads should share out the tiles of `fast/cpu`? A whole step in bfloat16 against the plain one on all threads, in turns; needs matrix units (AMX) and several cores.

python benchmarks/tiles_threads.py [--out benchmarks/tiles_threads.json]

Each thread of the tiles has sums of its own, as large as the weights. What came of it is `_SHARE` there: so many pairs of slot and patch for a thread, at least.
"""

import argparse
from pathlib import Path
from unittest.mock import patch
import torch
from tqdm import tqdm
from measure import alternate, machine, peak_bytes
from steps import SIZES, models, step_sides
from slotnb.core import write_json
from slotnb.tiles import tiles_obstacle


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', default=str(Path(__file__).parent / 'tiles_threads.json'), help='where the numbers go')
    args = p.parse_args()
    if why := tiles_obstacle(1024, 384):
        raise SystemExit(f'nothing to measure: {why}')
    rows, all_of_them = [], torch.get_num_threads()
    for name, repeats in tqdm(
        {'papers, batch 2': 11, 'papers, batch 16': 3, 'default sizes, MLP decoder': 11}.items(), unit='size'
    ):
        size = SIZES[name]
        sides = step_sides(*models(**size), ('fp32', 'bf16'))
        pairs, bf16 = size['batch'] * size['slots'] * size['patches'], sides.pop('bf16')

        def by(threads):
            def run():
                with patch('slotnb.tiles._SHARE', -(-pairs // threads)):
                    bf16()

            return run

        sides |= {f'bf16, {n}': by(n) for n in (1, 2, 3, 4, 6, 8, 16) if n <= all_of_them}
        memory = {side: peak_bytes(f) for side, f in sides.items()}
        rows += [
            dict(
                size=name,
                pairs=pairs,
                side=side,
                ms=1e3 * t['median'],
                ratio=t['ratio']['median'],
                peak_mb=memory[side] / 1e6,
            )
            for side, t in alternate(sides, repeats).items()
        ]
    write_json(args.out, dict(machine=machine(), rows=rows))


if __name__ == '__main__':
    main()
