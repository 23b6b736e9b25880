"What people have or type by mistake: read rightly, or refused in one sentence that names it."

import io
import json
import os
import re
import shutil
import tarfile
import zipfile
import numpy as np
import pytest
import torch
from conftest import DATA, ROOT
from PIL import Image
from slotnb.commands.segment import SegmentCommand, find_segmenter
from slotnb.core import SlotnbError
from slotnb.formats.detect import open_dataset
from slotnb.formats.multi_object import record_splits
from slotnb.formats.shards import encode_png
from slotnb.formats.splits import find_shards
from slotnb.runs.checkpoints import load_tensors
from slotnb.weights import read_state
from test_errors import refused, slotnb


@pytest.fixture
def photos(tmp_path):
    (tmp_path / 'photos').mkdir()
    for i in range(3):
        Image.new('RGB', (48, 32), (60, 80 * i, 90)).save(tmp_path / f'photos/{i}.jpg')
    return tmp_path / 'photos'


@pytest.mark.parametrize(
    'args, words',
    [
        (('fotos',), ("PATH 'fotos' does not exist; did you mean 'photos'?",)),
        (('photo/0.jpg',), ("PATH 'photo/0.jpg' does not exist; did you mean 'photos'?",)),
        (('photos/00.jpg',), ("did you mean 'photos/0.jpg'",)),
        (('zzz',), ("PATH 'zzz' does not exist; give a folder",)),
        (('',), ('PATH is empty',)),
        (('photos', '--out', ''), ('out is empty',)),
        (('photos', '--out', 'photos/0.jpg'), ('photos/0.jpg is a file',)),
        (('photos', '--run', 'photoz'), ("run 'photoz' does not exist; did you mean 'photos'?",)),
        (('photos', '--run', 'movie'), ("run 'movie' does not exist; shipped models: movi_a",)),
        (('photos', '--run', 'photos'), ("'photos' is no trained run",)),
        (('photos', '--num_slots', 1_000_000), ('num_slots 1000000', 'at most 1024')),
        (('photos', '--shifts', 1000), ('shifts 1000',)),
        (('~no_such_account/x',), ('no account',)),
    ],
)
def test_slips_of_segment(args, words, photos, tmp_path):
    refused(slotnb('segment', *args, cwd=tmp_path), *words)
    assert not [p for p in tmp_path.rglob('*') if p.name in ('labels', 'segment.json')]


def test_slots_of_a_clustering_are_not_replaced():
    "0 slots once became 11."
    settings = dict(run='spectral', backbone='timm:test_vit', weights='random', device='cpu')
    with pytest.raises(SlotnbError, match='num_slots 0 must be at least 2'):
        find_segmenter(SegmentCommand('photos', num_slots=0, **settings))


@pytest.mark.parametrize(
    'args, words',
    [
        (('data', 'convert', DATA, 'out', '--shard_size', 0), ('shard_size is 0',)),
        (('train', '--data_dir', DATA, '--save_dir', ''), ('save_dir', 'name of a folder')),
        (('train', '--data_dir', DATA, '--batch_size', 2**63), ('batch_size', 'at most 10 million')),
        (('train', '--data_dir', DATA, '--save_dir', 'caf\udce9'), ('save_dir', 'UTF-8')),
    ],
)
def test_slips_of_other_commands(args, words, tmp_path):
    refused(slotnb(*args, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())


def test_masks_that_segment_wrote_are_no_photographs(photos):
    (photos / 'segment.json').write_text('{}')
    for name in ('labels', 'overlays'):
        (photos / name).mkdir()
        Image.new('RGB', (48, 32)).save(photos / name / '0.jpg')
    Image.new('RGB', (99, 99)).save(photos / 'contact_sheet.png')
    assert [s.name for s in open_dataset(photos, None, masks=False)] == ['0', '1', '2']


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_pipes_are_named_and_not_opened(photos, tmp_path):
    os.mkfifo(photos / 'pipe.png')
    assert open_dataset(photos, None).unread['no regular file'] == 1
    lists = tmp_path / 'voc/ImageSets/Main'
    lists.mkdir(parents=True)
    photos.rename(tmp_path / 'voc/JPEGImages')
    os.mkfifo(lists / 'train.txt')
    with pytest.raises(SlotnbError, match='train.txt is no regular file'):
        open_dataset(tmp_path / 'voc', 'train')
    (lists / 'train.txt').unlink()
    (lists / 'train.txt').write_bytes('é'.encode('latin1'))
    with pytest.raises(SlotnbError, match='train.txt is no text in UTF-8'):
        open_dataset(tmp_path / 'voc', 'train')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_a_pipe_among_features(photos, tmp_path):
    from slotnb.backbones import ViTBackbone
    from slotnb.features import extract

    net = ViTBackbone('timm:test_vit', 'random', resolution=64, device='cpu')
    extract(net, open_dataset(photos, None), cache=tmp_path / 'cache', show_progress=False).load()
    (shard,) = (tmp_path / 'cache').rglob('0*.safetensors')
    shard.unlink()
    os.mkfifo(shard)
    with pytest.raises(SlotnbError, match='no regular file'):
        extract(net, open_dataset(photos, None), cache=tmp_path / 'cache', show_progress=False).load()


def test_numpy_weights(tmp_path):
    weights = {'blocks.0.norm1.weight': np.ones(4, np.float32)}
    np.savez(tmp_path / 'plain.npz', **weights)
    assert read_state(tmp_path / 'plain.npz')['blocks.0.norm1.weight'].equal(torch.ones(4))
    np.savez(tmp_path / 'pickled.npz', w=np.array([dict(a=1)], dtype=object))
    np.savez(tmp_path / 'jax.npz', **{'Transformer/encoderblock_0/kernel': np.ones(4)})
    for name, why in dict(pickled='never unpickled', jax='are of JAX').items():
        with pytest.raises(SlotnbError, match=f'{name}.npz .*{why}'):
            read_state(tmp_path / f'{name}.npz')


def test_one_bit_of_torch_weights(tmp_path):
    "torch reads such a file without a word."
    path = tmp_path / 'w.pth'
    torch.save({'w': torch.ones(5000)}, path)
    read_state(path)
    with zipfile.ZipFile(path) as z:
        name = next(n for n in z.namelist() if n.endswith('data/0'))
        at = path.read_bytes().index(z.read(name)[:400])
    data = bytearray(path.read_bytes())
    data[at + 42] ^= 1
    path.write_bytes(data)
    assert not torch.load(path, weights_only=True)['w'].equal(torch.ones(5000))
    with pytest.raises(SlotnbError, match='w.pth are damaged'):
        read_state(path)


@pytest.mark.skipif(os.name != 'posix' or os.geteuid() == 0, reason='root may read every file')
def test_a_checkpoint_that_may_not_be_read(tmp_path):
    path = tmp_path / 'best_model.safetensors'
    path.touch(0)
    with pytest.raises(SlotnbError, match='may not be read'):
        load_tensors(path)


def test_sets_that_say_how_many_files_they_have(tmp_path):
    def put(*names):
        for name in names:
            (tmp_path / name).touch()

    put('train-00000-of-00003.tar', 'train-00001-of-00003.tar')
    with pytest.raises(SlotnbError, match='2 of 3 files are there, train-00002-of-00003.tar is missing'):
        find_shards(tmp_path, 'train')
    put('train-00002-of-00003.tar')
    assert len(find_shards(tmp_path, 'train')) == 3
    (tmp_path / 'index.json').write_text(json.dumps(dict(shardlist=[dict(url='train-000009.tar')])))
    with pytest.raises(SlotnbError, match='train-000009.tar is missing, which index.json names'):
        find_shards(tmp_path, 'train')
    put('clevr.tfrecords-00000-of-00002')
    with pytest.raises(SlotnbError, match='clevr.tfrecords-00001-of-00002 is missing'):
        record_splits(tmp_path)


INFINITE, DIGITS = float('inf'), 'DIGITS'
ABSURD = {  # what dataset_info.json says of a split
    'records': dict(shardLengths=[str(2**31), '1']),
    'more than an array': dict(shardLengths=[2**63, 1]),
    'infinite': dict(shardLengths=[INFINITE, 1]),
    'negative': dict(shardLengths=[-1, 3]),
    'digits': dict(shardLengths=[DIGITS, 1]),
    'shards': dict(shardLengths=[2] * 10**6),
    'width': dict(filepathTemplate='{SPLIT:>10000000000}'),
    'long': dict(filepathTemplate='{SPLIT}' * 10**6),
    'attribute': dict(filepathTemplate='{SPLIT.__class__}'),
}


@pytest.mark.parametrize('kind', [*ABSURD, 'deep', 'frames'])
def test_absurd_numbers_of_movi(tmp_path, kind):
    "Refused before anything of that size is allocated, also where broken shards are to be skipped."
    shutil.copytree(ROOT / 'tests/fixtures/movi_a/64x64/1.0.0', tmp_path / 'movi')
    path = tmp_path / 'movi/dataset_info.json'
    if kind == 'deep':
        path.write_text('[' * 10**4 + ']' * 10**4)
    elif kind == 'frames':
        path = path.with_name('features.json')
        text, n = re.subn(r'("dimensions": \[\s*"?)\d+(?="?,\s*"?64"?,\s*"?64\b)', rf'\g<1>{10**9}', path.read_text())
        assert n
        path.write_text(text)
    else:
        info = json.loads(path.read_text())
        info['splits'][0] |= ABSURD[kind]
        path.write_text(json.dumps(info).replace('Infinity', '1e999').replace(f'"{DIGITS}"', '7' * 5000))
    for more in ((), ('--skip_broken', '--max_frames', 0)):
        refused(slotnb('data', 'info', 'movi', '--out', '', *more, cwd=tmp_path), path.name)


@pytest.mark.parametrize('text', ['{"frame": 1e999}', '{"frame": NaN}', '[' * 10**4, '{"frame": ' + '7' * 5000 + '}'])
def test_absurd_metadata_of_shards(tmp_path, text):
    with tarfile.open(tmp_path / 'a.tar', 'w') as tar:
        for name, data in {'a.png': encode_png(np.zeros((8, 8, 3), np.uint8)), 'a.json': text.encode()}.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    refused(slotnb('data', 'info', 'a.tar', '--out', '', cwd=tmp_path), 'a.tar/a.json', 'write the shard again')


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
@pytest.mark.parametrize('name', ['rgba_00000.png', 'segmentation_00000.png', 'metadata.json'])
def test_pipes_in_scenes(few_scenes, tmp_path, name):
    path = few_scenes / 'train/scene_0003' / name
    path.unlink()
    os.mkfifo(path)
    refused(slotnb('data', 'info', few_scenes, '--out', '', cwd=tmp_path), name, 'no regular file')
    assert len(open_dataset(few_scenes, 'train', skip_broken=True, progress=False).scenes) == 7


def test_the_home_folder_in_every_flag(few_scenes, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    (tmp_path / 'home').mkdir()
    for i, flag in enumerate((['--out', '~/0.png'], ['--out=~/1.png'])):
        assert slotnb('data', 'info', few_scenes, *flag, cwd=tmp_path).returncode == 0
        assert (tmp_path / f'home/{i}.png').is_file()
    assert not (tmp_path / '~').exists()


def test_a_long_message_is_shortened(tmp_path):
    result = slotnb('train', '--data_dir', DATA, '--decoder', 'x' * 10**6, cwd=tmp_path)
    refused(result, 'decoder')
    assert len(result.stderr) < 3000


def test_text_that_a_terminal_cannot_show(few_scenes, tmp_path):
    "Half a surrogate pair in JSON, and any name where the terminal knows ASCII only."
    for path in few_scenes.rglob('metadata.json'):
        text = path.read_text().replace('"metal"', r'"\ud800"').replace('"rubber"', '"é"')
        path.write_text(text)
    done = slotnb('data', 'info', few_scenes, '--out', '', cwd=tmp_path, PYTHONIOENCODING='ascii')
    assert done.returncode == 0 and r'\ud800' in done.stdout, done.stderr
