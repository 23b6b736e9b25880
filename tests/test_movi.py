"""MOVi's TFRecords: equal to what TensorFlow Datasets reads, whatever the file system, and every way in which a copy
may be broken."""

import hashlib
import importlib.util
import json
import os
import pickle
import shutil
import struct
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
import fsspec
import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader
from slotnb.formats import tfrecords
from slotnb.core import SlotnbError
from slotnb.formats.movi import MoviRecords

FIXTURES = Path(__file__).parent / 'fixtures'
MOVI_A, MOVI_C = FIXTURES / 'movi_a/64x64/1.0.0', FIXTURES / 'movi_c/24x24/1.0.0'
FIRST, SECOND = (f'movi_a-train.tfrecord-0000{k}-of-00002' for k in (0, 1))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path / 'cache'))


@pytest.fixture
def root(tmp_path):
    return Path(shutil.copytree(MOVI_A, tmp_path / 'movi_a/64x64/1.0.0'))


@pytest.fixture
def reads(monkeypatch):
    "Size of every read from a shard."
    log, read = [], tfrecords.read_bytes

    def counting(fs, url, start=None, stop=None):
        b = read(fs, url, start, stop)
        if 'tfrecord' in url:
            log.append(len(b))
        return b

    monkeypatch.setattr(tfrecords, 'read_bytes', counting)
    return log


def opened(root, split='train', max_frames=0, **kwargs):
    return MoviRecords(root, split, max_frames, progress=False, **kwargs)


def sha(a):
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16]


def same(a, b):
    return (
        (a.image == b.image).all()
        and (a.segmentation == b.segmentation).all()
        and a.instances == b.instances
        and a[:2] == b[:2]
    )


def error(f, *args, **kwargs):
    "The message, which has to be one line."
    with pytest.raises(SlotnbError) as e:
        f(*args, **kwargs)
    assert '\n' not in str(e.value) and len(str(e.value)) < 600
    return str(e.value)


def agree(ds, records, keys):
    want = [f for r in records for f in r['frames']]
    assert len(ds) == len(want) and ds.metadata(0)['video_name'] == records[0]['video_name']
    assert [ds.metadata(i)['tfds_id'] for i in range(0, len(ds), ds.num_frames)] == [r['tfds_id'] for r in records]
    for s, f in zip(ds, want):
        assert s.image.dtype == np.uint8 and s.segmentation.dtype == np.int64
        assert (sha(s.image), sha(s.segmentation)) == (f['image'], f['segmentation'])
        got = [
            {dict(material='material_label', shape='shape_label').get(k, k): v for k, v in o.items()}
            for o in s.instances
        ]
        assert [{k: o[k] for k in keys(f['instances'])} for o in got] == [
            {k: o[k] for k in keys(f['instances'])} for o in f['instances']
        ]


@pytest.mark.parametrize('folder', [MOVI_A, MOVI_C], ids=['movi_a', 'movi_c'])
def test_agrees_with_what_tfds_recorded(folder):
    for split, records in json.loads((folder.parent.parent / 'expected.json').read_text()).items():
        agree(opened(folder, split), records, lambda insts: insts[0].keys())


@pytest.mark.skipif(
    not importlib.util.find_spec('tensorflow_datasets'),
    reason='needs tensorflow_datasets, which only writes the fixtures',
)
@pytest.mark.parametrize('folder', [MOVI_A, MOVI_C], ids=['movi_a', 'movi_c'])
def test_agrees_with_tfds_itself(folder):
    sys.path.insert(0, str(FIXTURES))
    import make_movi

    for split, records in make_movi.expected(folder).items():
        agree(opened(folder, split), records, lambda insts: insts[0].keys())


def test_labels_are_names():
    s, c = opened(MOVI_A)[0], opened(MOVI_C, 'test')[0]
    assert set(s.materials) <= {'metal', 'rubber'} and {o['shape'] for o in s.instances} <= {
        'cube',
        'cylinder',
        'sphere',
    }
    assert len(s.instances[0]['color']) == 3 and np.shape(s.instances[0]['bboxes_3d']) == (8, 3)
    assert set(c.materials) == {''} and all(
        o['asset_id'].startswith('asset_') and isinstance(o['category'], str) for o in c.instances
    )
    for n, o in enumerate(s.instances, 1):
        assert o['visibility'] == (s.segmentation == n).sum()


def test_max_frames():
    assert [len(opened(MOVI_A, max_frames=m)) for m in (1, 2, 0, None, 99)] == [3, 6, 9, 9, 9]
    assert [(s.name, s.frame) for s in opened(MOVI_A, max_frames=2)] == [
        (f'train_0000{n}', f) for n in range(3) for f in range(2)
    ]
    assert 'max_frames' in error(opened, MOVI_A, max_frames=-1)


# ---- the index


def test_opening_reads_headers_and_a_frame_reads_its_record(reads):
    ds = opened(MOVI_A)
    assert reads == [12] * 3
    reads.clear()
    frames = list(ds)
    assert (
        sum(reads) == sum((MOVI_A / f).stat().st_size for f in (FIRST, SECOND)) and len(reads) == 3
    )  # every record once, frames in order
    reads.clear()
    ds[8]
    ds[0]
    ds[1]
    assert len(reads) == 1 and same(ds[1], frames[1])  # record 2 was the last one; frames 0 and 1 share record 0


def test_index_is_reused_until_a_shard_changes(root, reads):
    opened(root)
    reads.clear()
    opened(root)
    assert reads == []
    other = (root / SECOND).read_bytes()
    whole = (root / FIRST).read_bytes()
    (root / SECOND).write_bytes(whole[: record_end(whole)])  # another record
    ds = opened(root)
    assert len(reads) == 3 and (ds[6].image == ds[0].image).all()
    (root / SECOND).write_bytes(other)
    os.utime(root / SECOND, (1, 1))
    reads.clear()
    opened(root)
    assert len(reads) == 3
    reads.clear()
    opened(root, 'validation')
    assert len(reads) == 2  # every split has an index of its own


def test_a_damaged_index_is_built_anew(root, reads, tmp_path):
    opened(root)
    (file,) = (tmp_path / 'cache/index').iterdir()
    for damage in (b'', file.read_bytes()[:-9], b'no array at all'):
        file.write_bytes(damage)
        reads.clear()
        assert len(list(opened(root))) == 9 and reads[:3] == [12] * 3


def test_no_index_of_broken_shards_is_kept(root, tmp_path):
    (root / FIRST).write_bytes((root / FIRST).read_bytes()[:-1])
    opened(root, skip_broken=True)
    assert not (tmp_path / 'cache/index').exists()


def test_changed_after_opening(root):
    ds = opened(root)
    (root / FIRST).write_bytes((root / FIRST).read_bytes()[:5000])
    assert f'{FIRST}: record 0' in (m := error(ds.check, progress=False)) and 'open the dataset again' in m


# ---- broken shards


def record_end(shard):
    return struct.unpack_from('<Q', shard)[0] + 16


def test_a_shard_cut_anywhere_is_named(root):
    whole = (root / FIRST).read_bytes()
    edge = record_end(whole)
    for n in sorted(
        {*range(0, len(whole), 4999), 1, 8, 11, 12, 13, edge - 1, edge, edge + 1, edge + 12, len(whole) - 1}
    ):
        (root / FIRST).write_bytes(whole[:n])
        message = error(opened, root)
        assert FIRST in message and 'copy' in message
        ds = opened(root, skip_broken=True)
        lost = 2 if n < edge else 1
        assert len(ds) == 9 - 3 * lost and len(ds.skipped) == 3 * lost and all(FIRST in m for m in ds.skipped)
        if n not in (0, edge):
            assert f'record {2 - lost}' in message  # at a record's end nothing is cut, records are missing


@pytest.mark.parametrize('at', [0, 50, -5, -1, 'middle'])
def test_a_flipped_bit_of_the_data(root, at):
    whole = bytearray((root / FIRST).read_bytes())
    edge = record_end(whole)
    whole[{0: edge + 12, 50: edge + 50, 'middle': edge + (len(whole) - edge) // 2}.get(at, at)] ^= 4
    (root / FIRST).write_bytes(whole)
    ds = opened(root)
    assert same(ds[0], opened(MOVI_A)[0])
    assert f'{FIRST}: record 1 fails its checksum' in error(lambda: ds[3])
    assert '2 more of 9 frames are broken too' in error(ds.check, progress=False)
    rest = opened(root, skip_broken=True)
    assert (
        rest.scenes == ['train_00000', 'train_00002']
        and len(rest.skipped) == 3
        and '3 broken ones skipped' in repr(rest)
    )


@pytest.mark.parametrize('at', range(12))
def test_a_flipped_bit_of_the_length(root, at):
    whole = bytearray((root / FIRST).read_bytes())
    whole[record_end(whole) + at] ^= 128
    (root / FIRST).write_bytes(whole)
    assert f'{FIRST}: the length of record 1 of 2 fails its checksum' in error(opened, root)
    assert opened(root, skip_broken=True).scenes == ['train_00000', 'train_00002']


def test_a_missing_shard(root):
    (root / FIRST).unlink()
    assert f'{FIRST} is missing' in error(opened, root)
    assert opened(root, skip_broken=True).scenes == ['train_00002']
    (root / SECOND).unlink()
    assert '1 more shards' in error(opened, root)
    assert 'all 9 samples are broken' in error(opened, root, skip_broken=True)


def test_a_shard_that_is_a_folder_or_no_tfrecord(root):
    (root / FIRST).unlink()
    (root / FIRST).mkdir()
    assert FIRST in error(opened, root)
    (root / FIRST).rmdir()
    (root / FIRST).write_bytes(b'\x1f\x8b' + bytes(500))
    assert FIRST in error(opened, root)


@pytest.mark.parametrize(
    'counts, shard, has, says', [(['3', '1'], FIRST, 2, 3), (['1', '1'], FIRST, 2, 1), (['2', '2'], SECOND, 1, 2)]
)
def test_wrong_counts(root, counts, shard, has, says):
    edit_info(root, lambda s: s.update(shardLengths=counts))
    assert f'{shard} has {has} records, dataset_info.json says {says}' in error(opened, root)
    assert shard in opened(root, skip_broken=True).skipped[0]


# ---- broken metadata


def edit_info(root, change, split='train'):
    info = json.loads((root / 'dataset_info.json').read_text())
    change(next(s for s in info['splits'] if s['name'] == split))
    (root / 'dataset_info.json').write_text(json.dumps(info))


@pytest.mark.parametrize('counts', [None, [], ['0']])
def test_an_empty_split(root, counts):
    edit_info(root, lambda s: s.pop('shardLengths') if counts is None else s.update(shardLengths=counts))
    assert "split 'train'" in (m := error(opened, root)) and 'is empty' in m and 'validation' in m


def test_an_empty_shard_among_others(root):
    for k, f in enumerate((FIRST, SECOND)):
        (root / f).rename(root / f'movi_a-train.tfrecord-{2 * k:05}-of-00003')
    (root / 'movi_a-train.tfrecord-00001-of-00003').write_bytes(b'')
    edit_info(root, lambda s: s.update(shardLengths=['2', '0', '1']))
    assert all(map(same, opened(root), opened(MOVI_A)))


def test_unknown_split_names_what_there_is():
    "Without a test set the validation set is read, and a remark says so."
    assert "no split 'extra'; it holds train, validation" in error(opened, MOVI_A, 'extra')
    test, val = opened(MOVI_A, 'test'), opened(MOVI_A, 'validation')
    assert test.scenes == val.scenes and same(test[0], val[0])
    assert "'validation' is read" in test.remarks[0] and not val.remarks


@pytest.mark.parametrize(
    'name, keys',
    [
        ('video', ['video']),
        ('video', ['video', 'video', 'shape']),
        ('segmentations', ['segmentations']),
        ('instances', ['instances']),
        ('instances', ['instances', 'sequence', 'feature']),
    ],
)
def test_a_key_is_missing_in_features_json(root, name, keys):
    tree = json.loads((root / 'features.json').read_text())
    node = tree['featuresDict']['features']
    for k in keys[:-1]:
        node = node[k]
    del node[keys[-1]]
    (root / 'features.json').write_text(json.dumps(tree))
    assert f"features.json does not describe '{name}'" in error(opened, root)


@pytest.mark.parametrize('text', ['', '[]', '{}', 'null', '{"content": "{"}', '{"featuresDict": {"features": []}}'])
def test_features_json_is_something_else(root, text):
    (root / 'features.json').write_text(text)
    assert 'features.json' in error(opened, root)


@pytest.mark.parametrize('file', ['features.json', 'instances-material_label.labels.txt'])
def test_a_metadata_file_is_missing(root, file):
    (root / file).unlink()
    assert f'{file} is missing' in error(opened, root)


@pytest.mark.parametrize(
    'text, field',
    [
        ('{', 'JSON'),
        ('[]', "'name'"),
        ('{}', "'name'"),
        ('{"name": "a"}', "'splits'"),
        ('{"name": "a", "splits": [{}]}', "'filepathTemplate'"),
        ('{"name": "a", "splits": [{"name": "train", "shardLengths": ["x"]}]}', "'splits'"),
        ('{"name": "a", "fileFormat": "array_record", "splits": []}', 'array_record'),
        (
            '{"name": "a", "splits": [{"name": "train", "shardLengths": ["1"], "filepathTemplate": "{NOTHING}"}]}',
            "'filepathTemplate'",
        ),
    ],
)
def test_dataset_info_is_something_else(root, text, field):
    (root / 'dataset_info.json').write_text(text)
    assert field in (m := error(opened, root)) and '1.0.0' in m


def test_the_parent_names_its_versions(root):
    for parent in (root.parent, root.parents[1], root.parents[2]):
        assert str(root) in error(opened, parent)
    (root.parent / 'empty').mkdir()
    assert 'none either' in error(opened, root.parent / 'empty')
    assert 'does not exist' in error(opened, root.parent / '2.0.0')


def test_a_template_of_another_tfds(root):
    for k, f in enumerate((FIRST, SECOND)):
        (root / f).rename(root / f'train-part{k:05}.tfrecord')
    edit_info(root, lambda s: s.update(filepathTemplate='{SPLIT}-part{SHARD_INDEX}.{FILEFORMAT}'))
    assert all(map(same, opened(root), opened(MOVI_A)))
    edit_info(root, lambda s: s.pop('filepathTemplate'), 'validation')
    assert all(map(same, opened(root, 'validation'), opened(MOVI_A, 'validation')))


def older(node):
    "A tree of features.json as TFDS 4.4 wrote it."
    ((kind, inner),) = [(k, v) for k, v in node.items() if k != 'pythonClassName' and isinstance(v, dict)] or [
        ('none', {})
    ]
    content = {k: older(v) for k, v in inner['features'].items()} if kind == 'featuresDict' else dict(inner)
    if 'feature' in content:
        content['feature'] = older(content['feature'])
    if 'shape' in content:
        content['shape'] = [int(n) for n in content['shape'].get('dimensions', [])]
    return dict(type=node['pythonClassName'], content=content)


@pytest.mark.parametrize('layout', ['content', 'content as text', 'type and content'])
def test_older_layouts_of_features_json(root, layout):
    tree = json.loads((root / 'features.json').read_text())
    content = tree['featuresDict']
    tree = (
        older(tree)
        if layout == 'type and content'
        else dict(type=tree['pythonClassName'], content=json.dumps(content) if 'text' in layout else content)
    )
    (root / 'features.json').write_text(json.dumps(tree))
    assert all(map(same, opened(root), opened(MOVI_A)))


# ---- records that are whole, but not MOVi


def frame(data):
    return (
        (n := struct.pack('<Q', len(data)))
        + struct.pack('<I', tfrecords.masked_crc(n))
        + data
        + struct.pack('<I', tfrecords.masked_crc(data))
    )


def rewrite(root, change):
    "Change the features of the second shard's only record; checksums are right."
    Example, Feature = tfrecords._messages()
    ex = Example.FromString((root / SECOND).read_bytes()[12:-4])
    feats = ex.features.feature
    values = {k: Feature.FromString(feats[k]) for k in feats}
    change(values)
    for k in list(feats):
        del feats[k]
    for k, v in values.items():
        feats[k] = v.SerializeToString()
    (root / SECOND).write_bytes(frame(ex.SerializeToString()))


def png(a):
    b = BytesIO()
    Image.fromarray(a).save(b, 'png')
    return b.getvalue()


def set_values(kind, name, *values):
    def change(v):
        del getattr(v[name], kind).value[:]
        getattr(v[name], kind).value.extend(values)

    return change


def hide(v):
    n = v['metadata/num_instances'].int64_list.value[0]
    v['instances/visibility'].int64_list.value[:] = [0] * 3 * n


@pytest.mark.parametrize(
    'change, says',
    [
        (lambda v: None, None),
        (lambda v: v.pop('video'), "has no 'video'"),
        (lambda v: v.pop('segmentations'), "has no 'segmentations'"),
        (lambda v: v.pop('metadata/num_instances'), "has no 'metadata/num_instances'"),
        (lambda v: v['video'].bytes_list.value.pop(), "2 frames in 'video', features.json says 3"),
        (set_values('bytes_list', 'video', b'x', b'', b'\x89PNG'), "frame 0 of 'video' cannot be decoded"),
        (set_values('bytes_list', 'segmentations', *[png(np.full((64, 64), 40, np.uint8))] * 3), 'shows the id 40'),
        (set_values('bytes_list', 'segmentations', *[png(np.zeros((32, 64), np.uint8))] * 3), 'shape (32, 64)'),
        (set_values('bytes_list', 'segmentations', *[png(np.zeros((64, 64, 3), np.uint8))] * 3), 'shape (64, 64, 3)'),
        (hide, 'no visible one has it'),
        (set_values('int64_list', 'metadata/num_instances', 7), 'do not fit 7 instances'),
        (lambda v: v['instances/mass'].float_list.value.pop(), "'instances/mass' do not fit"),
        (lambda v: v['instances/material_label'].int64_list.value.__setitem__(0, 9), "'instances/material_label' is 9"),
    ],
)
def test_a_whole_record_that_is_not_movi(root, change, says):
    rewrite(root, change)
    ds = opened(root)
    if says is None:
        assert same(ds[6], opened(MOVI_A)[6])
    else:
        assert f'{SECOND}: record 0' in (m := error(ds.check, progress=False)) and says in m


def test_no_label_and_no_instances(root):
    rewrite(root, lambda v: v['instances/material_label'].int64_list.value.__setitem__(0, -1))
    assert opened(root)[6].materials[0] == ''

    def nothing(v):
        for k in list(v):
            if k.startswith('instances/'):
                v[k] = type(v[k])()
        v['metadata/num_instances'].int64_list.value[:] = [0]
        set_values('bytes_list', 'segmentations', *[png(np.zeros((64, 64), np.uint8))] * 3)(v)

    rewrite(root, nothing)
    assert opened(root)[6].instances == []


def test_a_record_that_is_no_example(root):
    (root / SECOND).write_bytes(frame(b'\xff' * 100))
    assert f'{SECOND}: record 0 is not a tf.train.Example' in error(opened(root).check, progress=False)


# ---- other file systems, processes, machines


def test_memory_url_equals_local():
    fs = fsspec.filesystem('memory')
    fs.put(str(MOVI_A), '/movi/1.0.0', recursive=True)
    try:
        ds = opened('memory://movi/1.0.0/')
        assert all(map(same, ds, opened(MOVI_A))) and len(ds) == 9 and 'memory://movi/1.0.0' in repr(ds)
        fs.pipe(f'/movi/1.0.0/{FIRST}', (MOVI_A / FIRST).read_bytes()[:-1])
        assert f'memory://movi/1.0.0/{FIRST} is cut off in record 1' in error(opened, 'memory://movi/1.0.0')
        assert 'memory://movi/1.0.0' in error(opened, 'memory://movi')
    finally:
        fs.rm('/movi', recursive=True)


class Bucket(BaseHTTPRequestHandler):
    "As much of Google Cloud Storage's JSON API as reading needs; counts the bytes of shards."

    def do_GET(self):
        url = urlsplit(self.path)
        q = {k: v[0] for k, v in parse_qs(url.query).items()}
        path = url.path.split('/o/', 1)
        if self.headers.get('Authorization'):
            return self.answer(401, b'{}')

        def item(p):
            return dict(
                kind='storage#object',
                bucket='public',
                name=str(p.relative_to(self.server.root)),
                size=str(p.stat().st_size),
            )

        if len(path) == 2:
            p = self.server.root / unquote(path[1])
            if not p.is_file():
                return self.answer(404, b'{"error": {"code": 404, "message": "Not Found"}}')
            if q.get('alt') != 'media' and 'download' not in url.path:
                return self.answer(200, json.dumps(item(p)).encode())
            body = p.read_bytes()
            if r := self.headers.get('Range'):
                start, stop = r.removeprefix('bytes=').split('-')
                body = body[int(start) : int(stop or len(body)) + 1]
            if 'tfrecord' in p.name:
                self.server.log.append(len(body))
            return self.answer(206 if r else 200, body)
        prefix, everything = q.get('prefix', ''), [p for p in self.server.root.rglob('*') if p.is_file()]
        names = {
            str(p.relative_to(self.server.root)): p
            for p in everything
            if str(p.relative_to(self.server.root)).startswith(prefix)
        }
        deep = {n for n in names if '/' in n[len(prefix) :]} if q.get('delimiter') else set()
        folders = {prefix + n[len(prefix) :].split('/')[0] + '/' for n in deep}
        self.answer(
            200,
            json.dumps(
                dict(items=[item(p) for n, p in names.items() if n not in deep], prefixes=sorted(folders))
            ).encode(),
        )

    def answer(self, code, body):
        self.send_response(code)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def bucket(root, monkeypatch):
    gcs = pytest.importorskip('gcsfs.core', reason='the extra movi is not installed').GCSFileSystem
    server = ThreadingHTTPServer(('127.0.0.1', 0), Bucket)
    server.root, server.log = root.parents[2], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{server.server_port}')
    gcs.clear_instance_cache()
    yield server
    gcs.clear_instance_cache()
    server.shutdown()
    server.server_close()


def test_a_bucket_without_an_account(bucket):
    """gcsfs itself against a server that refuses any credentials: equal to local, headers only, then every record
    once, in workers too."""
    url = 'gs://public/movi_a/64x64/1.0.0'
    ds = opened(url)
    assert bucket.log == [12] * 3 and tfrecords.filesystem(url).storage_options == dict(
        token='anon'
    )  # a developer's own login isn't used
    bucket.log.clear()
    assert all(map(same, ds, opened(MOVI_A))) and len(bucket.log) == 3
    assert str(ds[0].path) == f'{url}/{FIRST}' and url in error(opened, 'gs://public/movi_a')
    seen = [
        s.name for b in DataLoader(opened(url, max_frames=1), batch_size=1, num_workers=2, collate_fn=list) for s in b
    ]
    assert seen == ds.scenes
    (bucket.root / f'movi_a/64x64/1.0.0/{FIRST}').unlink()
    assert f'{url}/{FIRST} is missing' in error(opened, url)


def test_an_unreachable_bucket(monkeypatch):
    gcs = pytest.importorskip('gcsfs.core', reason='the extra movi is not installed').GCSFileSystem

    def down(self, *args, **kwargs):
        raise ConnectionError('the network\nis down')

    monkeypatch.setattr(gcs, 'info', down)
    assert 'gs://public/movi_a/1.0.0/dataset_info.json cannot be reached (the network is down)' in error(
        opened, 'gs://public/movi_a/1.0.0'
    )


def test_an_unknown_scheme_and_a_missing_library(monkeypatch):
    assert 'nix://movi' in error(opened, 'nix://movi')
    monkeypatch.setitem(sys.modules, 'google_crc32c', None)
    assert 'pip install slotnb[movi]' in error(opened, MOVI_A)


@pytest.mark.parametrize('shuffle', [False, True])
def test_two_workers_give_every_frame_once(shuffle):
    ds = opened(MOVI_A)
    alone = {(s.name, s.frame): sha(s.image) for s in ds}
    seen = [
        (s.name, s.frame, sha(s.image))
        for b in DataLoader(ds, batch_size=3, num_workers=2, shuffle=shuffle, collate_fn=list)
        for s in b
    ]
    assert Counter(seen) == Counter((*k, v) for k, v in alone.items())


def test_fingerprint_names_the_pictures_without_reading_them(root, reads):
    whole = opened(root)
    reads.clear()
    name = whole.fingerprint()
    assert sum(reads) == 4 * len(whole.scenes) and name == opened(MOVI_A).fingerprint()
    fewer = opened(root)
    fewer.entries = fewer.entries[:-1]
    path = root / FIRST
    raw = bytearray(path.read_bytes())
    at = int(whole.index[0].sum()) + 12
    raw[at] ^= 1
    path.write_bytes(raw)  # another checksum, so other pictures
    assert len({name, fewer.fingerprint(), opened(root, max_frames=1).fingerprint(), opened(root).fingerprint()}) == 4


def test_pickling(reads):
    ds = opened(MOVI_A)
    unread = pickle.dumps(ds)
    ds[0]
    b = pickle.dumps(ds)
    reads.clear()
    assert b == unread  # no record travels along
    assert all(map(same, pickle.loads(b), ds)) and sum(reads) > 0
