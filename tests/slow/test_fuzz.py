"""Damaged inputs with fixed seeds: the result or one sentence, no hang, no more than 4 GB, nothing half written.

Each input is read by a forked process that has only imported slotnb, with limits of time and memory."""

import os
import shutil
import subprocess
import sys
import numpy as np
import pytest
from conftest import ROOT, copy_scenes
from PIL import Image

TINY = dict(backbone='timm:test_vit', weights='random', resolution='64', normalizer='instance', rounds=1, device='cpu')
TINY |= dict(num_slots=3, slot_dim=8, hidden_dim=8, num_epochs=2, warmup_epochs=1, batch_size=4)
FUZZ = r"""
import json, os, random, resource, shutil, signal, socket, sys
from pathlib import Path
import timm, torch
from slotnb.backbones import ViTBackbone
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.evaluate import evaluate, load_run
from slotnb.explorer.replay import Replay
from slotnb.features import extract
from slotnb.formats.convert import convert_data, info
from slotnb.formats.detect import open_dataset
from slotnb.report import load_curves, load_features, load_runs
from slotnb.runs.config import TrainConfig
from slotnb.train import fit
import slotnb.commands.data, slotnb.commands.runs, slotnb.commands.segment

settings, kind, first, last = eval(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
GIGA = 2**30
os.environ['SLOTNB_CACHE'] = os.path.abspath('cache')


def limited(work, *args):
    "Exit code and output of a forked process: 0 done, 2 refused, else what must not happen."
    pid = os.fork()
    if not pid:
        code = 1
        try:
            size = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + 4 * GIGA, size + 4 * GIGA))
            resource.setrlimit(resource.RLIMIT_CPU, (30, 30))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.alarm(120)  # of which a busy machine may give us a quarter
            code = work(*args) or 0
        except SlotnbError as e:
            assert '\n' not in str(e).strip(), e
            print('refused:', ascii(str(e))[:300], flush=True)
            code = 2
        except SystemExit as e:
            code = e.code
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code if isinstance(code, int) else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def nasty(rng):
    "A value that does not belong into JSON."
    numbers = [-1, 0, 2**31, 2**63, 10**40, 1e308, float('nan'), float('inf'), True, '@DIGITS@', '@INFINITE@']
    texts = ['', 'x' * 10**5, '\ud800', '\0', '../../x', '$x^']
    return rng.choice([None, [], {}, [[[]]], {'a': {}}, [1] * 10**5, '@DEEP@', *numbers, *texts])


def change_json(text, rng):
    "Replace a random node."
    tree = json.loads(text)
    nodes = []

    def walk(node):
        for k, v in node.items() if isinstance(node, dict) else enumerate(node):
            nodes.append((node, k))
            if isinstance(v, (dict, list)):
                walk(v)

    if isinstance(tree, (dict, list)):
        walk(tree)
    if not nodes or rng.random() < 0.1:
        tree = nasty(rng)
    else:
        node, k = rng.choice(nodes)
        if isinstance(node, dict) and rng.random() < 0.3:
            del node[k]
        else:
            node[k] = nasty(rng)
    text = json.dumps(tree)
    for mark, value in dict(DEEP='[' * 10**4 + ']' * 10**4, DIGITS='7' * 5000, INFINITE='1e999').items():
        text = text.replace(f'"@{mark}@"', value)
    return text.encode()


def damage(path, rng):
    "Change a file, or put something else in its place; returns how."
    ways = 'bit bits cut empty zeros big junk repeat other json json json fifo socket folder dangling loop gone'
    data, how = bytearray(path.read_bytes()), rng.choice(ways.split())
    if how == 'json':
        if path.suffix != '.json':
            how = 'big'
        else:
            path.write_bytes(change_json(bytes(data), rng))
            return how
    at = rng.randrange(max(1, len(data)))
    if how in ('bit', 'bits') and data:
        for _ in range(1 if how == 'bit' else 20):
            data[rng.randrange(min(len(data), rng.choice([100, 1000, 10**9])))] ^= 1 << rng.randrange(8)
    elif how == 'cut':
        del data[at:]
    elif how == 'empty':
        data = bytearray()
    elif how == 'zeros':
        data[at : at + 64] = bytes(min(64, len(data) - at))
    elif how == 'big':
        at %= rng.choice([40, 400, 10**9])
        data[at : at + 8] = rng.choice([b'\xff' * 8, b'\x7f' + b'\xff' * 7, b'\0\0\0\x80' * 2, b'99999999'])
    elif how == 'junk':
        data[at : at + 200] = rng.randbytes(200)
    elif how == 'repeat':
        data = data * 3
    elif how == 'other':
        data = bytearray(rng.choice(sorted(p for p in path.parent.iterdir() if p.is_file())).read_bytes())
    path.unlink()
    if how == 'fifo':
        os.mkfifo(path)
    elif how == 'socket':
        here = os.getcwd()
        os.chdir(path.parent)  # the address of a socket is short
        socket.socket(socket.AF_UNIX).bind(path.name)
        os.chdir(here)
    elif how == 'folder':
        path.mkdir()
    elif how == 'dangling':
        path.symlink_to('nowhere')
    elif how == 'loop':
        path.symlink_to(path.name)
    elif how != 'gone':
        path.write_bytes(data)
    return how


def read_data(root):
    info(root, max_frames=0, progress=False)
    convert_data(root, f'{root}-out', progress=False)
    if kind not in ('images', 'videos'):  # which have no ground truth
        convert_data(root, f'{root}-out2', 'kubric', skip_broken=True, progress=False)


def read_run(root):
    "Everything that reads a run; each part may refuse."
    run_dir, refused = Path(root) / 'a/timm_test_vit', []
    config = TrainConfig(**settings | dict(save_dir=str(Path(root) / 'a')))
    parts = [lambda: load_run(run_dir), lambda: Replay(run_dir), lambda: load_features(load_runs(root))]
    parts += [lambda: load_curves(load_runs(root)), lambda: evaluate(run_dir, False)]
    parts += [lambda: evaluate(fit(config, False), False)]
    for part in parts:
        try:
            part()
        except SlotnbError as e:
            refused.append(str(e))
    if refused:
        raise SlotnbError(refused[0])


def read_weights(root):
    path = Path(root) / f'w.{kind}'
    net = ViTBackbone('timm:test_vit', str(path), resolution=64, device='cpu')
    net(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


def read_cache(root):
    net = ViTBackbone('timm:test_vit', 'random', resolution=64, device='cpu')
    extract(net, open_dataset('scenes', 'train'), cache=root, show_progress=False, shard_size=2).load()


VALUES = ['', ' ', '-1', '0', '1e999', 'nan', '9' * 40, str(2**31), str(2**63), 'None', '[]', '1,2,3', '-1,-2', '1x1']
VALUES += ['x' * 300, 'a/' * 3000, '../..', '~', '~nobody0/x', '/dev/null', '/dev/zero', '/proc/self/mem', 'file:///']
VALUES += ['$(x)', 'a:b', 'os:system', 'meta', 'xla', 'cuda:99', 'a\nb', '\u202e', '0x0', '64x0', 'ünïcode']
VALUES += ['timm:nothing', 'open_clip:x/y', 'https://', 'gs://']


def command(rng):
    name = rng.choice(['train', 'segment', 'features', 'data', 'report', 'sweep', 'explore'])
    train = [x for k, v in settings.items() for x in (f'--{k}', str(v))]
    base = dict(
        train=[*train, '--save_dir', 'out-cli'],
        segment=['scenes', '--out', 'out-masks', '--run', 'runs/a/timm_test_vit', '--split', 'test', '--device', 'cpu'],
        features=['--backbone', 'timm:test_vit', '--weights', 'random', '--data_dir', 'scenes', '--resolution', '64'],
        data=['info', 'scenes', '--out', ''],
        report=['--runs_dir', 'nowhere'],
        sweep=['--out_dir', 'out-sweep', '--notebook', 'no.ipynb', '--data_dir', 'scenes'],
        explore=['nowhere'],
    )[name]
    flags = [i for i, a in enumerate(base) if a.startswith('--')]
    more = dict(
        train='lr clip_norm optimizer decoder slot_init loss max_frames layer facet warm_start target engine',
        segment='num_slots min_pixels work_size shifts max_frames resize weights',
        features='layer facet grid_size split max_frames out',
        data='split max_frames',
        report='out notebook',
        sweep='set workers seed normalizer',
        explore='port data_dir',
    )[name].split()
    if flags and rng.random() < 0.5:
        base[rng.choice(flags) + 1] = rng.choice(VALUES)
    else:
        base += [f'--{rng.choice(more)}', rng.choice(VALUES)]
    return [name, *base]


READERS = dict.fromkeys('images masks kubric shards movi videos'.split(), read_data)
READERS |= dict.fromkeys('safetensors pth'.split(), read_weights) | dict(runs=read_run, features=read_cache)
bad, codes = [], []
if kind != 'commands':
    shutil.copytree(kind, f'{kind}-sound')
    if READERS[kind] is read_data:  # imports what reading imports late; threads of torch would not outlive a fork
        read_data(f'{kind}-sound')
    assert limited(READERS[kind], f'{kind}-sound') == 0, 'the sound one is refused'
for i in range(first, last):
    rng = random.Random(f'{kind} {i}')
    if kind == 'commands':
        args = command(rng)
        what, code = ascii(args), limited(main, args)
        left = [p for name in ('out-cli', 'out-masks', 'out-sweep') for p in Path(name).rglob('.*')]
    else:
        root = Path(f'{kind}-{i}')
        shutil.copytree(kind, root)
        files = sorted(p for p in root.rglob('*') if p.is_file() and not p.name.startswith('.'))
        path = rng.choice(files)
        what = f'{path} {damage(path, rng)}'
        code = limited(READERS[kind], str(root))
        left = [p for f in (root, Path(f'{root}-out'), Path(f'{root}-out2')) for p in f.rglob('.*')]
        for f in (root, f'{root}-out', f'{root}-out2'):
            shutil.rmtree(f, ignore_errors=True)
    print(i, what[:300], code, flush=True)
    codes.append(code)
    left = [p for p in left if p.name != '.owner.lock']
    if code not in (0, 2) or left:
        bad.append((what[:300], code, left[:3]))
for name in bad:
    print('BAD', *name)
print('refused', codes.count(2), 'read', codes.count(0))
sys.exit(bool(bad))
"""


@pytest.fixture(scope='module')
def inputs(tmp_path_factory):
    "Small sound inputs of each kind, in folders of their names."
    import av
    from slotnb.backbones import ViTBackbone
    from slotnb.evaluate import evaluate
    from slotnb.features import extract
    from slotnb.formats.convert import convert_data
    from slotnb.formats.detect import open_dataset
    from slotnb.runs.config import TrainConfig
    from slotnb.train import fit
    from safetensors.torch import save_file
    import torch

    folder = tmp_path_factory.mktemp('inputs')
    copy_scenes(folder / 'scenes', train=4, test=2)
    copy_scenes(folder / 'kubric', train=2)
    scenes = [*open_dataset(folder / 'scenes', 'train')]
    for split in ('images/train', 'masks/train'):
        (folder / 'masks' / split).mkdir(parents=True)
    (folder / 'images').mkdir()
    suffixes = ('png', 'jpg', 'webp', 'tiff', 'gif', 'bmp')
    for i, suffix in enumerate(suffixes):
        Image.fromarray(scenes[i % 4].image).resize((64, 48)).save(folder / f'images/{i}.{suffix}')
    for i, s in enumerate(scenes):
        Image.fromarray(s.image).save(folder / f'masks/images/train/{i}.png')
        Image.fromarray(s.segmentation.astype(np.uint8)).save(folder / f'masks/masks/train/{i}.png')
    convert_data(folder / 'scenes', folder / 'shards', shard_size=2, progress=False)
    shutil.copytree(ROOT / 'tests/fixtures/movi_a/64x64/1.0.0', folder / 'movi')
    (folder / 'videos').mkdir()
    for name in ('a.mp4', 'b.mkv'):
        with av.open(str(folder / 'videos' / name), 'w') as film:
            stream = film.add_stream('libx264', rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
            for i in range(6):
                frame = np.full((48, 64, 3), 40 * i, np.uint8)
                film.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
            film.mux(stream.encode())
    config = TrainConfig(**TINY, data_dir=str(folder / 'scenes'), save_dir=str(folder / 'runs/a'))
    evaluate(fit(config, False), False)
    net = ViTBackbone('timm:test_vit', 'random', resolution=64, device='cpu')
    extract(net, open_dataset(folder / 'scenes', 'train'), 2, folder / 'cache0', False, 0, 2)
    (folder / 'cache0').rename(folder / 'features')
    tensors = net.net.state_dict() if hasattr(net.net, 'state_dict') else {}
    for name in ('safetensors', 'pth'):
        (folder / name).mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / 'safetensors/w.safetensors')
    torch.save(dict(state_dict=tensors), folder / 'pth/w.pth')
    return folder


KINDS = dict(images=30, masks=30, kubric=30, shards=30, movi=30, videos=20, runs=40)
KINDS |= dict(safetensors=15, pth=15, features=20, commands=40)


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_inputs(inputs, kind):
    command = [sys.executable, '-c', FUZZ, repr(TINY | dict(data_dir='scenes')), kind, '0', str(KINDS[kind])]
    done = subprocess.run(
        command, cwd=inputs, env=os.environ | dict(OMP_NUM_THREADS='1'), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert int(done.stdout.split()[-3]) > 0, 'nothing was refused: nothing was damaged'


def test_three_hundred():
    assert sum(KINDS.values()) == 300
