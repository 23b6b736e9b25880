"The feature cache: atomic shards, resumed extraction, and reading that does not load everything."

import re
import signal
import subprocess
import sys
import types
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from conftest import DATA
from slotnb import features as F
from slotnb.backbones import ViTBackbone
from slotnb.core import SlotnbError, digest, read_json, write_json
from slotnb.data import Dataset, Entry, KubricFolders, Sample
from slotnb.features import Features, LazyFeatures, extract, feature_key, gather, to_device


class Pictures(Dataset):
    "Images generated from their number; those in `wide` have another size, those in `broken` cannot be read."

    def __init__(self, n, wide=(), broken=()):
        super().__init__('pictures', [Entry(f'scene_{i:04}', 0, i) for i in range(n)])
        self.wide, self.broken = wide, broken

    def read(self, entry):
        if entry.where in self.broken:
            raise SlotnbError(f'{entry.name}.png cannot be read')
        shape = (8, 12 if entry.where in self.wide else 8, 3)
        image = np.random.default_rng(entry.where).integers(0, 255, shape, np.uint8)
        return Sample(entry.name, 0, Path(entry.name), image, None, [])

    def fingerprint(self, progress=True):
        return digest([e.where for e in self.entries])


class Counting:
    "A fake backbone: 4 tokens of 6 channels from the mean of the image. Counts calls and images, stops at `limit`."

    record, device = dict(backbone='timm:vit/tiny', grid=[2, 2], dim=6), torch.device('cpu')

    def __init__(self, limit=10**9, scale=1.0):
        self.images, self.calls, self.limit, self.scale = 0, 0, limit, scale

    def __call__(self, images):
        if self.images + len(images) > self.limit:
            raise KeyboardInterrupt
        self.images += len(images)
        self.calls += 1
        return images.float().mean((1, 2, 3))[:, None, None] * self.scale + torch.arange(24.0).view(4, 6)


def want(n, **kw):
    return (
        torch.stack([torch.tensor(s.image).float().mean() + torch.arange(24.0).view(4, 6) for s in Pictures(n, **kw)])
        .half()
        .float()
    )


def files(folder):
    return sorted(p.name for p in Path(folder).rglob('*') if p.is_file())


def fill(folder, n=10, backbone=None, **kw):
    return extract(backbone or Counting(), Pictures(n), 2, folder, False, **dict(shard_size=4) | kw)


def test_only_missing_shards_are_computed(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, backbone=Counting(limit=7))
    assert files(tmp_path) == ['00000.safetensors', 'index.json']
    b = Counting()
    feats = fill(tmp_path, backbone=b)
    assert b.images == 6 and files(tmp_path) == [*(f'0000{i}.safetensors' for i in range(3)), 'index.json']
    assert torch.equal(feats.feats, want(10)) and feats.images_per_second > 0
    next(tmp_path.rglob('00001*')).unlink()
    b = Counting()
    assert torch.equal(fill(tmp_path, backbone=b)[4:8], want(10)[4:8]) and b.images == 4
    b = Counting()
    assert fill(tmp_path, backbone=b).images_per_second is None and b.images == 0


def test_killed_between_shards(tmp_path):
    "A killed process leaves complete shards only; a second one resumes."
    code = f'''import os, signal, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_features as t
class Dies(t.Counting):
    def __call__(self, images):
        if self.images >= 6: os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(images)
t.fill({str(tmp_path)!r}, backbone=Dies())'''
    assert subprocess.run([sys.executable, '-c', code]).returncode == -signal.SIGKILL
    assert files(tmp_path) == ['00000.safetensors', 'index.json']
    b = Counting()
    assert torch.equal(fill(tmp_path, backbone=b).feats, want(10)) and b.images == 6


def test_shards_keep_the_size_they_began_with(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, backbone=Counting(limit=5))
    feats = fill(tmp_path, shard_size=7)
    assert feats.shard_size == 4 and torch.equal(feats.feats, want(10))
    with pytest.raises(SlotnbError, match='shard_size 0'):
        fill(tmp_path / 'other', shard_size=0)


@pytest.mark.parametrize('size, n', [(1, 3), (4, 8), (4, 9), (100, 5)])
def test_lazily_indexed_is_whole(tmp_path, size, n):
    feats, whole = fill(tmp_path, n, shard_size=size), want(n)
    assert (
        len(feats) == n
        and feats.shape == tuple(whole.shape) == feats.feats.shape
        and feats.feats.dtype == torch.float32
    )
    for i in (
        0,
        -1,
        n - 1,
        slice(None),
        slice(1, None, 2),
        slice(0, 0),
        [n - 1, 0, 0],
        torch.tensor([1, 0]),
        torch.arange(n) > 0,
        np.array([2, 1]),
    ):
        assert torch.equal(feats[i], whole[i]), i
    assert torch.equal(torch.stack(list(feats)), whole) and feats.feats is feats.feats is not feats.load()
    for i in (n, -n - 1, [0, n]):
        with pytest.raises(IndexError):
            feats[i]


def test_indexing_copies(tmp_path):
    "A training loop that works in place cannot change the cache."
    feats = fill(tmp_path)
    first = feats[0]
    first += 1
    feats[:]
    feats.shards[0][0] = 7
    assert torch.equal(Features(feats.folder).feats, want(10))


@pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs /proc')
def test_shards_lie_in_their_files(tmp_path):
    "The memory of each shard is a mapping of its file."
    feats = fill(tmp_path)
    maps = [re.match(r'(\w+)-(\w+) .* (/.*)$', l) for l in Path('/proc/self/maps').read_text().splitlines()]
    maps = [(int(m[1], 16), int(m[2], 16), m[3]) for m in maps if m]
    for i, shard in enumerate(feats.shards):
        assert [Path(f) for a, b, f in maps if a <= shard.data_ptr() < b] == [feats.folder / f'{i:05}.safetensors']


def cut(p):
    p.write_bytes(p.read_bytes()[:-1])


def empty(p):
    p.write_bytes(b'')


def foreign(p):
    p.write_bytes(b'not a safetensors file')


def exchange(p):
    p.write_bytes(p.with_name('00000.safetensors').read_bytes())


def flip_a_bit(p):
    data = bytearray(p.read_bytes())
    data[-3] ^= 1
    p.write_bytes(data)


def swap_scenes(p):
    save_file(dict(feats=load_file(p)['feats'].flip(0).contiguous()), p)


def another_type(p):
    save_file(dict(feats=load_file(p)['feats'].bfloat16()), p)


@pytest.mark.parametrize('damage', [cut, empty, foreign, exchange, flip_a_bit, swap_scenes, another_type])
def test_a_damaged_shard_is_named_and_only_it_is_redone(tmp_path, damage):
    shard = fill(tmp_path).folder / '00002.safetensors'
    damage(shard)
    with pytest.raises(SlotnbError, match='00002.safetensors cannot be read .*delete the file and run again') as e:
        fill(tmp_path)
    assert '\n' not in str(e.value)
    shard.unlink()
    b = Counting()
    assert torch.equal(fill(tmp_path, backbone=b).feats, want(10)) and b.images == 2


def test_a_cache_of_an_older_version_gets_its_digests(tmp_path):
    "It is read as it is, without the backbone, and checked from then on."
    folder = fill(tmp_path).folder
    index = read_json(folder / 'index.json')
    write_json(folder / 'index.json', {k: v for k, v in index.items() if k != 'digests'})
    for p in folder.glob('*.safetensors'):
        save_file(load_file(p), p)
    b = Counting()
    assert torch.equal(fill(tmp_path, backbone=b).feats, want(10)) and not b.images
    assert read_json(folder / 'index.json') == index
    swap_scenes(folder / '00000.safetensors')
    with pytest.raises(SlotnbError, match='00000.safetensors cannot be read .*digest'):
        fill(tmp_path)


@pytest.mark.parametrize(
    'text',
    [
        '{',
        '[]',
        '{"shape": [1, 2]}',
        '{"shape": [10, 4, 6], "shard_size": 0, "record": {}}',
        '{"shape": ["a", 4, 6], "shard_size": 4, "record": {}}',
    ],
)
def test_a_damaged_index_is_named(tmp_path, text):
    (fill(tmp_path).folder / 'index.json').write_text(text)
    with pytest.raises(SlotnbError, match='index.json'):
        fill(tmp_path)


def test_index_comes_first_and_says_all(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fill(tmp_path, backbone=Counting(limit=0))
    assert files(tmp_path) == ['index.json']
    index = read_json(next(tmp_path.rglob('index.json')))
    assert index == dict(shape=[10, 4, 6], shard_size=4, dtype='float16', digests=True, record=Counting.record)
    with pytest.raises(SlotnbError, match='00000.safetensors'):
        Features(next(tmp_path.iterdir()))


def test_full_disk_is_reported_before_the_backbone_runs(tmp_path, monkeypatch):
    free = types.SimpleNamespace(free=10 * 4 * 6 * 2 - 1)
    monkeypatch.setattr(F.shutil, 'disk_usage', lambda p: free)
    b = Counting()
    with pytest.raises(SlotnbError, match='need 0.00 GB.*free some space'):
        fill(tmp_path, backbone=b)
    assert b.calls == 0 and not files(tmp_path)
    free.free += 1
    fill(tmp_path)  # what is needed and no more
    next(tmp_path.rglob('00002*')).unlink()
    free.free = 2 * 4 * 6 * 2
    fill(tmp_path)  # of the missing ones only


@pytest.mark.parametrize('workers', [0, 2])
def test_sizes_and_broken_images(tmp_path, workers):
    "Images of another size are processed alone, in order; a broken one is named, also from a worker."
    feats = extract(Counting(), Pictures(6, wide=(1, 2)), 3, tmp_path, False, workers)
    assert torch.equal(feats.feats, want(6, wide=(1, 2)))
    with pytest.raises(SlotnbError) as e:
        extract(Counting(), Pictures(9, broken=(5,)), 2, tmp_path / 'broken', False, workers, shard_size=4)
    assert str(e.value) == 'scene_0005.png cannot be read' and files(tmp_path / 'broken') == [
        '00000.safetensors',
        'index.json',
    ]


def test_beyond_half_precision(tmp_path):
    with pytest.raises(SlotnbError, match="'timm:vit/tiny' are beyond half precision"):
        fill(tmp_path, backbone=Counting(scale=1e5))
    assert files(tmp_path) == ['index.json']


def test_lazy_features(tmp_path):
    "Selected, changed and nested features equal those of the whole tensor, from disk and from memory."
    feats, whole, index = fill(tmp_path), want(10), torch.tensor([7, 0, 3, 3, 9])
    for source in (feats, whole):
        lazy = LazyFeatures(LazyFeatures(source, lambda x: x - 1), lambda x: 2 * x, index)
        expected = 2 * (whole - 1)[index]
        assert len(lazy) == 5 and lazy.shape == expected.shape and torch.equal(lazy.load(), expected)
        for i in (0, -1, slice(1, 4), [4, 0], torch.tensor([2, 2]), torch.arange(5) > 2):
            assert torch.equal(lazy[i], expected[i]), i
        assert torch.equal(gather(lazy, torch.tensor([3, 1])), gather(expected, torch.tensor([3, 1])))
    assert to_device(index, torch.device('cpu')) is index


def test_the_key(tmp_path):
    key = feature_key(Counting(), Pictures(3))
    assert re.fullmatch(r'timm-vit-tiny-[0-9a-f]{16}', key)
    other = Counting()
    other.record = Counting.record | dict(dim=7)
    assert len({key, feature_key(Counting(), Pictures(4)), feature_key(other, Pictures(3))}) == 3


def test_fingerprint_is_of_the_pixels_in_order(few_scenes):
    def name():
        return KubricFolders(few_scenes).fingerprint(False)

    first = name()
    (few_scenes / 'train/scene_0000').rename(few_scenes / 'train/scene_0000a')
    assert name() == first
    (few_scenes / 'train/scene_0000a').rename(few_scenes / 'train/scene_9999')
    assert name() != first
    few = KubricFolders(few_scenes)
    few.entries = few.entries[:4]
    assert few.fingerprint(False) != name()


def test_real_backbone_is_as_without_a_cache(tmp_path):
    scenes = KubricFolders(DATA, 'test')
    scenes.entries = scenes.entries[:3]
    b = ViTBackbone('dinov2_vits14')
    direct = b(torch.stack([torch.tensor(s.image).permute(2, 0, 1) for s in scenes]))
    assert torch.equal(extract(b, scenes, 3, tmp_path, False).feats, direct.half().float())
    torch.testing.assert_close(
        extract(b, scenes, 2, tmp_path / 'other', False, 1, 2).feats, direct, rtol=2e-3, atol=2e-3
    )
