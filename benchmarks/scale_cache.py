"""The feature cache at the size of MOVi-A: 9,703 videos x 24 frames = 232,872 frames of 256 x 384 in half precision, 46 GB.

A stand-in backbone returns random numbers, so it is the cache that is measured: writing, going on after SIGKILL, memory, reading. The images per
second of a real DINOv2 are measured apart, on rendered scenes. What is not run is arithmetic, and said to be.

python benchmarks/scale_cache.py [--share 10] [--dir DIR] [--out benchmarks/scale_cache.json]
"""

import argparse, json, os, platform, shutil, signal, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, torch
from slotnb.backbones import ViTBackbone
from slotnb.core import digest, write_json
from slotnb.data import Dataset, Entry, KubricFolders, Sample
from slotnb.features import Features, extract

FRAMES, TOKENS, DIM = 9703 * 24, 256, 384


class Blank(Dataset):
    "So many black images of 8 x 8 pixels: reading them costs next to nothing."

    def __init__(self, n):
        super().__init__('blank', [Entry('scene', i, i) for i in range(n)])

    def read(self, entry):
        return Sample('scene', entry.frame, Path('blank'), np.zeros((8, 8, 3), np.uint8), None, [])

    def fingerprint(self, progress=True):
        return digest(len(self))


class StandIn:
    "Random half features, a part of one random block for every batch; kills its own process after `limit` images."

    device = torch.device('cpu')
    record = dict(backbone='stand-in', grid=[16, 16], dim=DIM)

    def __init__(self, limit):
        self.pool, self.seen, self.limit = torch.randn(64, TOKENS, DIM).half(), 0, limit or 10**9

    def __call__(self, images):
        if self.seen >= self.limit:
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen += len(images)
        return self.pool[self.seen % 56 :][: len(images)]


def memory():
    "MB: the process's own numbers, and pages of mapped files, which the system takes back when it needs them."
    status = dict(l.split(':', 1) for l in Path('/proc/self/status').read_text().splitlines())
    return {k: int(status[k].split()[0]) * 1024 / 1e6 for k in ('VmHWM', 'RssAnon', 'RssFile')}


def write_side(folder, frames, limit):
    "In a process of its own: extract, and say how long and how much memory it took beyond the libraries."
    before, start = memory(), time.perf_counter()
    backbone = StandIn(limit)
    extract(backbone, Blank(frames), 8, folder, False)
    os.sync()
    return dict(seconds=time.perf_counter() - start, images=backbone.seen, peak_mb=memory()['VmHWM'] - before['VmHWM'])


def read_side(folder, batches, batch_size=32):
    "In a process of its own: random batches of single samples, from the disk and then from the system's page cache, and their memory."
    for f in Path(folder).rglob('*.safetensors'):
        with open(f, 'rb') as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    before, start = memory(), time.perf_counter()
    feats = Features(next(Path(folder).iterdir()))
    result = dict(opened_ms=1000 * (time.perf_counter() - start), shards=len(feats.shards), batch_size=batch_size)
    for name in ('cold', 'warm'):
        rng, times = torch.Generator().manual_seed(0), []
        for _ in range(batches):
            index = torch.randint(len(feats), (batch_size,), generator=rng)
            start = time.perf_counter()
            batch = feats[index]
            times.append(time.perf_counter() - start)
            assert batch.shape == (batch_size, TOKENS, DIM) and batch.dtype == torch.float32
        result[name] = dict(
            batch_ms_median=1000 * statistics.median(times),
            batch_ms_p95=1000 * sorted(times)[int(0.95 * batches)],
            samples_per_second=batches * batch_size / sum(times),
        )
    after = memory()
    return result | dict(
        own_memory_mb=after['RssAnon'] - before['RssAnon'], mapped_pages_mb=after['RssFile'] - before['RssFile']
    )


def dinov2(images, repeats=3):
    "Images per second of the real network through `extract`, fp32, in fresh caches."
    backbone, scenes, speeds = (
        ViTBackbone('dinov2_vits14', device='cpu'),
        KubricFolders(Path(__file__).parent.parent / 'data/movi_a_subset', 'train'),
        [],
    )
    scenes.entries = scenes.entries[:images]
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as d:
            speeds.append(extract(backbone, scenes, cache=d, show_progress=False).images_per_second)
    return dict(weights=str(backbone.weights), images=images, images_per_second=speeds)


def apart(*args):
    "Run one side in a fresh process; None when it was killed."
    done = subprocess.run([sys.executable, __file__, '--side', *map(str, args)], stdout=subprocess.PIPE, text=True)
    if done.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(done.returncode)
    return json.loads(done.stdout) if done.returncode == 0 else None


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--share', type=int, default=10, help='the number of frames is divided by this')
    p.add_argument(
        '--dir',
        default=None,
        help='where the cache is written and deleted again; default: the folder for temporary files',
    )
    p.add_argument('--batches', type=int, default=200, help='random batches read')
    p.add_argument('--images', type=int, default=32, help='images that the real DINOv2 sees, three times')
    p.add_argument('--out', default='benchmarks/scale_cache.json', help='where the numbers go')
    p.add_argument('--side', nargs='+', help=argparse.SUPPRESS)
    c = p.parse_args()
    torch.set_num_threads(2)
    if c.side:
        sides = dict(write=write_side, read=read_side, dinov2=dinov2)
        return print(json.dumps(sides[c.side[0]](*[int(a) if a.isdigit() else a for a in c.side[1:]])))
    share, folder = c.share, Path(tempfile.mkdtemp(prefix='slotnb_scale_', dir=c.dir))
    try:
        free = shutil.disk_usage(folder).free
        while FRAMES // share * TOKENS * DIM * 2 * 1.2 > free and share < 10_000:
            share *= 5
        frames = FRAMES // share
        size = frames * TOKENS * DIM * 2
        assert apart('write', folder, frames, frames // 2) is None  # killed in the middle
        kept = len(list(folder.rglob('*.safetensors'))) * 256
        rest = apart('write', folder, frames, 0)
        assert kept + rest['images'] == frames, (kept, rest)
        shutil.rmtree(folder)
        folder.mkdir()
        whole = apart('write', folder, frames, 0)
        on_disk = sum(f.stat().st_size for f in folder.rglob('*') if f.is_file())
        read = apart('read', folder, c.batches)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    real = apart('dinov2', c.images)
    mb_s, speed = size / 1e6 / whole['seconds'], max(real['images_per_second'])
    result = dict(
        what=f'one {share}th of MOVi-A, random features: the cache is measured, not a backbone',
        frames=frames,
        gigabytes=size / 1e9,
        overhead=on_disk / size - 1,
        killed_after=frames // 2,
        kept=kept,
        computed_by_second_call=rest['images'],
        write=whole | dict(mb_per_second=mb_s),
        read=read,
        dinov2=real,
        extrapolated=dict(
            frames=FRAMES,
            gigabytes=FRAMES * TOKENS * DIM * 2 / 1e9,
            write_minutes=share * whole['seconds'] / 60,
            dinov2_hours=FRAMES / speed / 3600,
        ),
        machine=dict(
            cpus=os.cpu_count(),
            load_average=os.getloadavg()[1],
            threads=torch.get_num_threads(),
            platform=platform.platform(),
            python=platform.python_version(),
            torch=torch.__version__,
        ),
    )
    write_json(c.out, result)
    rows = [
        ('measured: frames written', f'{frames:,} (1/{share} of {FRAMES:,}), random features of a stand-in backbone'),
        ('size', f'{size / 1e9:.2f} GB, {100 * result["overhead"]:.3f} % more on disk'),
        (
            'killed in the middle',
            f'after {frames // 2:,} images; {kept:,} were on disk, the second call computed the other {rest["images"]:,}',
        ),
        (
            'writing',
            f'{mb_s:.0f} MB/s, {frames / whole["seconds"]:.0f} frames/s; peak memory {whole["peak_mb"]:.0f} MB beyond the libraries',
        ),
        ('opening', f'{read["shards"]} shards in {read["opened_ms"]:.0f} ms'),
        *(
            (
                f'random batches of {read["batch_size"]}, {k}',
                f'{read[k]["batch_ms_median"]:.1f} ms (95 %: {read[k]["batch_ms_p95"]:.1f}), {read[k]["samples_per_second"]:.0f} samples/s',
            )
            for k in ('cold', 'warm')
        ),
        (
            'memory of the reader',
            f'{read["own_memory_mb"]:.0f} MB of its own; {read["mapped_pages_mb"]:.0f} MB of mapped pages, which the system can take back',
        ),
        (
            'DINOv2 ViT-S/14, fp32',
            f'{speed:.1f} images/s, the best of {", ".join(f"{s:.1f}" for s in real["images_per_second"])} ({real["weights"]})',
        ),
        (
            'load of this machine',
            f'{os.getloadavg()[1]:.1f} processes on {os.cpu_count()} cores in the last five minutes: above the number of cores, all times are too long',
        ),
        ('arithmetic: size', f'{FRAMES:,} x {TOKENS} x {DIM} x 2 bytes = {FRAMES * TOKENS * DIM * 2 / 1e9:.1f} GB'),
        ('arithmetic: writing', f'{share} x {whole["seconds"]:.0f} s = {share * whole["seconds"] / 60:.0f} minutes'),
        ('arithmetic: DINOv2', f'{FRAMES:,} / {speed:.1f} = {FRAMES / speed / 3600:.1f} hours on this machine'),
    ]
    for name, text in rows:
        print(f'{name:27} {text}')


if __name__ == '__main__':
    main()
