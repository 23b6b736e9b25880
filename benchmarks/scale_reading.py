"""Does reading MOVi scale? Bytes, memory and ratios on shards of full-size records, each number of shards in a process of its own.

python benchmarks/scale_reading.py [--shards 8 32 128 1024] [--out benchmarks/scale_reading.json]

A record has MOVi-A's fields at 256x256: 24 frames of a rendered scene, and noise for the flows, depth and normals that nobody asks for (how well
the real ones are compressed is not known here, so sizes are those of these records). A few hundred MiB of them are written to a temporary folder, once; the shards are hard links to these files, so that 1024 shards with 9,703 records cost no more space than 8.
Bytes are those of /proc/self/io (every read of the process, whatever made it), so this runs on Linux only.
"""

import argparse, json, os, platform, subprocess, sys, tempfile, time
from io import BytesIO
from pathlib import Path
import numpy as np
from PIL import Image
from slotnb.formats import movi, tfrecords
from slotnb.data import KubricFolders
from slotnb.formats.movi import MoviRecords

ROOT = Path(__file__).parent.parent
FIXTURE, FRAMES, VIDEOS = ROOT / 'tests/fixtures/movi_a/64x64/1.0.0', 24, 9703


def png(a):
    b = BytesIO()
    Image.fromarray(a).save(b, 'png')
    return b.getvalue()


def record(sample, seed):
    "A tf.train.Example of one scene that moves sideways, framed as TFRecord; what is never decoded is noise of the right size."
    Example, Feature = tfrecords._messages()
    rng = np.random.default_rng(seed)
    ex = Example()
    n, (h, w) = len(sample.instances), sample.segmentation.shape

    def put(name, kind, values):
        f = Feature()
        getattr(f, kind).value.extend(values)
        ex.features.feature[name] = f.SerializeToString()

    rolled = lambda a: [png(np.roll(a, 4 * f, 1)) for f in range(FRAMES)]
    put('video', 'bytes_list', rolled(sample.image))
    put('segmentations', 'bytes_list', rolled(sample.segmentation.astype(np.uint8)))
    for name in ('forward_flow', 'backward_flow'):
        put(name, 'int64_list', rng.integers(30_000, 36_000, FRAMES * h * w * 2).tolist())
    for name, channels in (('depth', 1), ('normal', 3), ('object_coordinates', 3)):
        put(name, 'bytes_list', [rng.bytes(h * w * channels) for _ in range(FRAMES)])
    put('metadata/video_name', 'bytes_list', [sample.name.encode()])
    for name, v in dict(width=w, height=h, num_frames=FRAMES, num_instances=n).items():
        put(f'metadata/{name}', 'int64_list', [v])
    for name, size in dict(
        mass=1, positions=3 * FRAMES, quaternions=4 * FRAMES, bboxes_3d=24 * FRAMES, color=3
    ).items():
        put(f'instances/{name}', 'float_list', rng.random(n * size).tolist())
    pixels = np.bincount(sample.segmentation.ravel(), minlength=n + 1)[1:]
    put('instances/visibility', 'int64_list', np.repeat(pixels, FRAMES).tolist())
    for name in ('material', 'shape', 'size', 'color'):
        put(f'instances/{name}_label', 'int64_list', [0] * n)
    data = ex.SerializeToString()
    size = len(data).to_bytes(8, 'little')
    crc = lambda b: tfrecords.masked_crc(b).to_bytes(4, 'little')
    return size + crc(size) + data + crc(data)


def dataset(root, bases, counts):
    "A version folder whose k-th shard has `counts[k]` records."
    root.mkdir()
    name = 'movi_a-train.tfrecord-{:05}-of-{:05}'
    for k, n in enumerate(counts):
        os.link(bases[n], root / name.format(k, len(counts)))
    for p in FIXTURE.glob('*.txt'):
        (root / p.name).write_bytes(p.read_bytes())
    tree = json.loads((FIXTURE / 'features.json').read_text())
    tree['featuresDict']['features']['video']['video']['shape']['dimensions'] = [str(FRAMES), '256', '256', '3']
    (root / 'features.json').write_text(json.dumps(tree))
    split = dict(name='train', shardLengths=[str(n) for n in counts])
    (root / 'dataset_info.json').write_text(json.dumps(dict(name='movi_a', fileFormat='tfrecord', splits=[split])))


# ---- in a fresh process


def bytes_read():
    return int(Path('/proc/self/io').read_text().split()[1])


def peak_mib():
    return (
        int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) / 1024
    )  # getrusage would count the parent's


class MaskHistory:
    "What a worker read, instead of the frames themselves."

    def __init__(self, ds):
        self.ds = ds

    def __len__(self):
        return len(self.ds)

    def __getitem__(self, i):
        s = self.ds[i]
        return s.name, s.frame, os.getpid(), bytes_read()


def measure(root):
    "Runs in the child: everything about one dataset, as a dict."
    from torch.utils.data import DataLoader, Subset

    def cost(f):
        start, before = time.perf_counter(), bytes_read()
        out = f()
        return out, bytes_read() - before, time.perf_counter() - start

    ds, open_bytes, open_seconds = cost(lambda: MoviRecords(root, 'train', 0, progress=False))
    _, again_bytes, again_seconds = cost(lambda: MoviRecords(root, 'train', 0, progress=False))
    size = int(ds.index[0, 1]) + 16
    ds[0]
    ds._last = None, None  # the first frame also imports what it needs
    out = dict(
        shards=len(ds.shards),
        records=len(ds.index),
        frames=len(ds),
        open_bytes=open_bytes,
        open_seconds=open_seconds,
        again_bytes=again_bytes,
        again_seconds=again_seconds,
        record_bytes=size,
        per_frame={},
    )
    picks = np.linspace(0, len(ds.index) - 1, 10).astype(int)  # videos from all over the split
    for videos in (1, 4, 10):
        wanted = [int(n) * FRAMES + f for n in picks[:videos] for f in range(FRAMES)]
        _, b, seconds = cost(lambda: [ds[i] for i in wanted])
        ds._last = None, None
        records = int(ds.index[picks[:videos], 1].sum()) + 16 * videos
        out['per_frame'][len(wanted)] = dict(
            bytes=b / len(wanted), seconds=seconds / len(wanted), record_bytes=records / len(wanted)
        )
    seen = [
        x
        for batch in DataLoader(
            Subset(MaskHistory(ds), range(4 * FRAMES)), batch_size=FRAMES, num_workers=2, collate_fn=list
        )
        for x in batch
    ]
    of = {pid: {(n, f) for n, f, p, _ in seen if p == pid} for pid in {x[2] for x in seen}}
    assert (
        len(of) == 2 and not set.intersection(*of.values()) and len(seen) == len(set.union(*of.values())) == 4 * FRAMES
    )
    out['worker_frames'] = sorted(map(len, of.values()))
    out['peak_rss_mib'] = peak_mib()  # of reading; what follows unpacks what is never wanted
    data = tfrecords.read_bytes(tfrecords.filesystem(ds.shards[0]), ds.shards[0], 12, size - 4)
    Example, Feature = tfrecords._messages()

    def unpack_all():
        return [Feature.FromString(v) for v in Example.FromString(data).features.feature.values()]

    both = [
        [cost(f)[2] for f in (lambda: tfrecords.parse_example(data, movi._FEATURES, 'record'), unpack_all)]
        for _ in range(7)
    ]
    out['unpack_all_over_wanted'] = float(np.median([b / a for a, b in both]))
    return out


# ---- in the parent


def table(results):
    "What the page shows: a row for each number of shards."
    rows = []
    for r in results:
        last = r['per_frame'][max(r['per_frame'], key=int)]
        rows.append(
            {
                'shards': r['shards'],
                'videos': r['records'],
                'headers, KiB': round(12 * r['records'] / 1024, 1),
                'read to open, KiB': round(r['open_bytes'] / 1024, 1),
                'opened again, KiB': round(r['again_bytes'] / 1024, 1),
                'index, ms a video': round(1000 * r['open_seconds'] / r['records'], 3),
                **{f'MiB a frame, {n} frames': round(v['bytes'] / 2**20, 3) for n, v in r['per_frame'].items()},
                'ms a frame': round(1000 * last['seconds'], 1),
                'peak RSS, MiB': round(r['peak_rss_mib']),
            }
        )
    return rows


def extrapolation(results):
    "Arithmetic, shown."
    big = max(results, key=lambda r: r['records'])
    mib = big['record_bytes'] / 2**20
    last = big['per_frame'][max(big['per_frame'], key=int)]
    frames, n = VIDEOS * FRAMES, big['records']
    per = big['open_seconds'] / n
    once = 'measured' if n == VIDEOS else 'extrapolated'
    gib = VIDEOS * mib / 1024
    return [
        f"all frames of MOVi-A's train split: {VIDEOS:,} videos x {FRAMES} = {frames:,} frames",
        f"the index: {VIDEOS:,} headers x 12 bytes = {VIDEOS * 12 / 1024:.0f} KiB, once ({once}: "
        f"{VIDEOS:,} x {1000 * per:.3f} ms = {VIDEOS * per:.1f} s on this disk)",
        f"the frames in order, with records of this size: {VIDEOS:,} records x {mib:.1f} MiB = {gib:.0f} GiB, "
        f"and as read here: {frames:,} x {last['bytes'] / 2**20:.2f} MiB = {frames * last['bytes'] / 2**30:.0f} GiB",
        f"their time on this machine, one process: {frames:,} x {1000 * last['seconds']:.0f} ms = {frames * last['seconds'] / 3600:.1f} h",
        f"one frame a video instead: the same {gib:.0f} GiB, because a checksum needs the whole record",
        f"memory of a process: {max(r['peak_rss_mib'] for r in results):.0f} MiB at most, with {min(r['records'] for r in results):,} videos or {n:,}",
        f"leaving flow, depth and normals packed: unpacking all of a record takes {big['unpack_all_over_wanted']:.0f} times as long",
    ]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        '--shards',
        type=int,
        nargs='+',
        default=[8, 32, 128, 1024],
        help='numbers of shards; 1024 has the 9,703 videos of MOVi-A',
    )
    p.add_argument('--out', default='benchmarks/scale_reading.json', help='where the numbers go')
    p.add_argument('--child', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return print(json.dumps(measure(args.child)))
    samples = KubricFolders(ROOT / 'data/movi_a_subset', 'train')
    results = []
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        records = [record(samples[i], i) for i in range(10)]
        bases = {n: tmp / f'{n}_records' for n in (9, 10)}
        for n, path in bases.items():
            path.write_bytes(b''.join(records[:n]))
        del records
        for shards in args.shards:
            tens = VIDEOS - 9 * shards if shards == 1024 else shards
            dataset(tmp / f'{shards}', bases, [10] * tens + [9] * (shards - tens))
            env = os.environ | dict(SLOTNB_CACHE=str(tmp / f'cache{shards}'))
            run = subprocess.run(
                [sys.executable, __file__, '--child', str(tmp / f'{shards}')],
                check=True,
                capture_output=True,
                text=True,
                env=env,
            )
            results.append(json.loads(run.stdout.splitlines()[-1]))
            print(f'{shards} shards: done')
    for r in results:
        for n, v in r['per_frame'].items():
            assert v['bytes'] < 1.01 * v['record_bytes'], f'{n} frames read more than their records: {v}'
        assert r['peak_rss_mib'] < 1536 and r['open_bytes'] < 12 * r['records'] + 200_000, r
    rows, lines = table(results), extrapolation(results)
    import pandas as pd

    print(pd.DataFrame(rows).set_index('shards').T.to_string(), *lines, sep='\n')
    Path(args.out).write_text(
        json.dumps(
            dict(
                machine=platform.processor() or platform.machine(), reading=rows, extrapolation=lines, results=results
            ),
            indent=1,
        )
        + '\n'
    )


if __name__ == '__main__':
    main()
