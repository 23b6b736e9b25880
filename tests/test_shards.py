"Shards: what we write is what webdataset reads, and every way in which an archive may be broken."

import io
import json
import tarfile
import numpy as np
import pytest
from PIL import Image
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders
from slotnb.formats.detect import open_dataset
from slotnb.formats.shards import TarShards, encode_png, index_shard, split_key, write_shards
from test_data import SEG, write

IMAGE = np.random.default_rng(0).integers(0, 255, (*SEG.shape, 3), np.uint8)
META = dict(name='scene 机', frame=0, instances=[dict(material='metal'), dict(material='rubber')])


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path_factory.mktemp('cache')))


def jpg(mode='RGB'):
    out = io.BytesIO()
    Image.fromarray(IMAGE).convert(mode).save(out, 'JPEG')
    return out.getvalue()


def shard(path, samples):
    "An archive of {key: {ending: bytes or what JSON takes}}."
    with tarfile.open(path, 'w') as tar:
        for key, members in samples.items():
            for ext, data in members.items():
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                info = tarfile.TarInfo(f'{key}.{ext}')
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


def whole(name):
    return {'png': encode_png(IMAGE), 'seg.png': encode_png(SEG), 'json': META | dict(name=name)}


def test_webdataset_reads_what_we_write(tmp_path):
    wds = pytest.importorskip('webdataset')
    for i in range(5):
        write(tmp_path / f'kubric/train/scene_{i:04}', frames=2)
    ours = KubricFolders(tmp_path / 'kubric', max_frames=0)
    paths = write_shards(ours, tmp_path / 'out', shard_size=4, progress=False)
    assert [p.name for p in paths] == ['train-000000.tar', 'train-000001.tar', 'train-000002.tar']
    theirs = list(wds.WebDataset([str(p) for p in paths], shardshuffle=False))
    assert len(theirs) == 10
    for t, s in zip(theirs, ours, strict=True):
        assert (pixels(t['png']) == s.image).all() and (pixels(t['seg.png']) == s.segmentation).all()
        assert json.loads(t['json']) == dict(name=s.name, frame=s.frame, instances=s.instances)
    for t, s in zip(TarShards(tmp_path / 'out', 'train', 0, progress=False), ours, strict=True):
        assert (
            t[:2] == s[:2]
            and (t.image == s.image).all()
            and (t.segmentation == s.segmentation).all()
            and t.instances == s.instances
        )
    assert len(TarShards(tmp_path / 'out', max_frames=1, progress=False)) == 5


def test_we_read_what_webdataset_writes(tmp_path):
    wds = pytest.importorskip('webdataset')
    with wds.ShardWriter(str(tmp_path / 'part-%03d.tar'), maxcount=3, verbose=0) as sink:
        for i in range(5):
            sink.write({'__key__': f'dir/{i:04}', 'png': IMAGE, 'json': dict(url='http://x')})
    ds = TarShards(tmp_path / 'part-{000..001}.tar', progress=False).check(progress=False)
    assert (
        ds.scenes == [f'dir/{i:04}' for i in range(5)]
        and not ds.has_ground_truth
        and (ds[4].image == IMAGE).all()
        and ds[4].instances == []
    )
    assert len(TarShards(tmp_path / 'part-*.tar', progress=False)) == 5


@pytest.mark.parametrize(
    'name, parts',
    [
        ('a/b.seg.png', ('a/b', 'seg.png')),
        ('./x.JPG', ('./x', 'jpg')),
        ('a.b/c.json', ('a.b/c', 'json')),
        ('._a.jpg', None),
        ('README', None),
    ],
)
def test_keys(name, parts):
    assert split_key(name) == parts


def test_a_mask_without_metadata_and_wide_ids(tmp_path):
    wide = np.where(SEG == 2, 700, SEG.astype(int))
    (s,) = TarShards(shard(tmp_path / 'a.tar', {'x': {'jpg': jpg(), 'seg.png': encode_png(wide)}}), progress=False)
    assert (s.segmentation == SEG).all() and [i['mask_id'] for i in s.instances] == [1, 700]


BAD = {  # members of the second of three samples, and words of the message
    'no image': ({'txt': b'a caption', 'seg.png': encode_png(SEG)}, "key 'b' has no image, only txt, seg.png"),
    'empty image': (whole('b') | {'png': b''}, 'a.tar/b.png cannot be read (it is empty)'),
    'half an image': (whole('b') | {'png': encode_png(IMAGE)[:999]}, 'a.tar/b.png cannot be read'),
    'CMYK': ({'seg.png': encode_png(SEG), 'jpg': jpg('CMYK')}, 'a.tar/b.jpg is of mode CMYK'),
    '16 bits': (whole('b') | {'png': encode_png(np.full((32, 48), 999))}, 'a.tar/b.png has 16 bits per channel'),
    'mask of another size': (
        whole('b') | {'seg.png': encode_png(SEG[::2])},
        'a.tar/b.seg.png is 48x16 pixels, its image 48x32',
    ),
    'no JSON': (whole('b') | {'json': b'{"name": '}, 'a.tar/b.json is not valid JSON'),
    'a list': (whole('b') | {'json': [1]}, 'a.tar/b.json must be an object'),
    'a wrong frame': (whole('b') | {'json': dict(name='b', frame='first')}, "an integer 'frame'"),
    'wrong instances': (whole('b') | {'json': dict(name='b', instances='two')}, "a.tar/b.json has no list 'instances'"),
    'an instance too few': (
        whole('b') | {'json': dict(name='b', instances=[{}])},
        'lists 1 instances, but its segmentation has the id 2',
    ),
}


@pytest.mark.parametrize('what', BAD)
def test_each_broken_sample_is_one_sentence_and_the_rest_is_read(tmp_path, what):
    members, words = BAD[what]
    path = shard(tmp_path / 'a.tar', dict(a=whole('a'), b=members, c=whole('c')))
    with pytest.raises(SlotnbError) as e:
        TarShards(path, progress=False).check(progress=False)
    assert words in str(e.value) and 'a.tar' in str(e.value) and '\n' not in str(e.value), e.value
    rest = TarShards(path, skip_broken=True, progress=False)
    assert rest.scenes == ['a', 'c'] and len(rest.skipped) == 1 and words in rest.skipped[0]


def test_half_a_truth_is_refused(tmp_path):
    path = shard(tmp_path / 'a.tar', dict(a=whole('a'), b={'png': encode_png(IMAGE)}))
    with pytest.raises(SlotnbError, match=r"a.tar: key 'b' has no mask 'b.seg.png'.*\(1 of 2"):
        TarShards(path, progress=False)
    rest = TarShards(path, skip_broken=True, progress=False)
    assert rest.scenes == ['a'] and len(rest.skipped) == 1


def test_cut_anywhere_is_named_with_its_member(tmp_path):
    "No cut loses a sample silently: a cut archive says so, or all that was in it is read."
    path = shard(tmp_path / 'a.tar', {k: whole(k) for k in 'abc'})
    data = path.read_bytes()
    ends = [o + -(-s // 512) * 512 for m in index_shard(path)['samples'].values() for o, s in m.values()]
    for n in {0, 100, 512, 700, *ends, *(e + 200 for e in ends), *(e - 300 for e in ends), *range(0, max(ends), 1999)}:
        path.write_bytes(data[:n])
        with pytest.raises(SlotnbError) as e:
            TarShards(path, progress=False)
        assert (
            'a.tar' in str(e.value)
            and '\n' not in str(e.value)
            and ('cut off at its member' in str(e.value) or 'not an uncompressed tar' in str(e.value))
        ), (n, e.value)
    path.write_bytes(data[: ends[-1] - 100])
    rest = TarShards(path, skip_broken=True, progress=False)
    assert rest.scenes == ['a', 'b'] and "member 'c.json'" in rest.skipped[0] and len(rest.skipped) == 1
    path.write_bytes(data)
    assert TarShards(path, progress=False).scenes == ['a', 'b', 'c']  # the index notices


def test_an_archive_that_shrinks_after_it_was_opened(tmp_path):
    path = shard(tmp_path / 'a.tar', {k: whole(k) for k in 'ab'})
    ds = TarShards(path, progress=False)
    path.write_bytes(path.read_bytes()[:4000])
    with pytest.raises(SlotnbError, match="a.tar is cut off at its member"):
        ds[1]
    path.unlink()
    with pytest.raises(SlotnbError, match='a.tar is missing'):
        ds[0]


def test_the_index_is_built_once(tmp_path, monkeypatch):
    path = shard(tmp_path / 'a.tar', dict(a=whole('a')))
    first = index_shard(path)
    monkeypatch.setattr(tarfile, 'open', None)  # walking again would fail
    again = index_shard(path)
    assert again['samples']['a'].keys() == first['samples']['a'].keys() and TarShards(path, progress=False).scenes == [
        'a'
    ]


def test_same_name_twice(tmp_path):
    for n in 'ab':
        shard(tmp_path / f'{n}.tar', {'0': whole('one scene')})
    with pytest.raises(SlotnbError, match=r"frame 0 of 'one scene' is in .*b.tar \(key 0\) and in .*a.tar"):
        TarShards(tmp_path, progress=False)
    with tarfile.open(tmp_path / 'c.tar', 'w') as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo('x.png'), io.BytesIO())
    with pytest.raises(SlotnbError, match="c.tar has two members 'x.png'"):
        TarShards(tmp_path / 'c.tar', progress=False)


def test_what_is_no_shard(tmp_path):
    (tmp_path / 'a.tar').write_text('hello')
    (tmp_path / 'loop.tar').symlink_to(tmp_path / 'loop.tar')
    (tmp_path / 'empty').mkdir()
    for args, words in (
        (('a.tar',), 'is not an uncompressed tar'),
        (('loop.tar',), 'leads back to itself'),
        (('b.tar',), 'b.tar is missing'),
        (('empty',), 'holds no .tar'),
        (('x-*.tar',), 'holds no .tar'),
        (('a.tar', 'test'), "has no split 'test'"),
        (('a.tar', None, -1), 'max_frames is -1'),
    ):
        with pytest.raises(SlotnbError) as e:
            TarShards(tmp_path / args[0], *args[1:], progress=False)
        assert words in str(e.value) and '\n' not in str(e.value), e.value


def test_splits_by_name_and_by_folder(tmp_path):
    for split in 'train', 'test':
        shard(tmp_path / f'{split}-000000.tar', {split: whole(split)})
    assert [TarShards(tmp_path, s, progress=False).scenes for s in ('train', 'test', None)] == [
        ['train'],
        ['test'],
        ['test', 'train'],
    ]
    with pytest.raises(SlotnbError, match="no shards of the split 'val'|has no split 'val'"):
        TarShards(tmp_path, 'val', progress=False)
    (tmp_path / 'val').mkdir()
    shard(tmp_path / 'val/x.tar', dict(v=whole('v')))
    assert TarShards(tmp_path, 'val', progress=False).scenes == ['v']
    shard(tmp_path / 'ood-000000.tar', dict(o=whole('o')))  # a name of one's own is known where it is asked for
    assert TarShards(tmp_path, 'ood', progress=False).scenes == ['o']
    for split in 'train', 'ood':
        write(tmp_path / f'kubric/{split}/scene_{split}')
    assert open_dataset(tmp_path / 'kubric', 'ood').scenes == ['scene_ood']


def test_writing_goes_on_and_leaves_no_half_shard(tmp_path):
    for i in range(5):
        write(tmp_path / f'kubric/train/scene_{i:04}')
    ds = KubricFolders(tmp_path / 'kubric')
    png = tmp_path / 'kubric/train/scene_0003/rgba_00000.png'
    data = png.read_bytes()
    png.write_bytes(data[:500])
    with pytest.raises(SlotnbError, match='scene_0003'):
        write_shards(ds, tmp_path / 'out', shard_size=2, progress=False)
    assert [p.name for p in (tmp_path / 'out').iterdir()] == ['train-000000.tar']
    first = (tmp_path / 'out/train-000000.tar').stat().st_mtime_ns
    png.write_bytes(data)
    assert (
        len(write_shards(ds, tmp_path / 'out', shard_size=2, progress=False)) == 3
        and (tmp_path / 'out/train-000000.tar').stat().st_mtime_ns == first
    )
    assert TarShards(tmp_path / 'out', 'train', progress=False).check(progress=False).scenes == ds.scenes


@pytest.mark.parametrize('kind', ['jpg png', 'jpg mask.png', 'image.jpg seg.png', 'png mask.png', 'png seg.png'])
def test_conventions_of_others_for_masks(tmp_path, kind):
    "A PNG beside a JPEG is the mask, not the image; a sample may name both."
    image, mask = kind.split()
    ids = np.kron([[0, 3], [9, 0]], np.ones((8, 8), int)).astype(np.uint8)
    photo = np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(photo).save(out, 'JPEG' if 'jpg' in image else 'PNG')
    shard(tmp_path / 'train-000000.tar', {'a': {image: out.getvalue(), mask: encode_png(ids), 'depth.npy': b'0'}})
    (sample,) = data = TarShards(tmp_path, 'train', progress=False)
    assert (sample.segmentation == np.choose(ids % 8, [0, 2, 0, 1])).all() and sample.image.std() > 50
    assert data.has_ground_truth and data.unread == {'.depth.npy': 1}


def test_a_split_in_folder_and_name_and_a_validation_set_as_test(tmp_path):
    for name in ('train/train-000.tar', 'val2017/val-000.tar'):
        (tmp_path / name).parent.mkdir()
        shard(tmp_path / name, {name[0]: whole(name[0])})
    assert TarShards(tmp_path, 'train', progress=False).scenes == ['t']
    test = TarShards(tmp_path, 'test', progress=False)
    assert test.scenes == ['v'] and "'val2017' is read" in test.remarks[0]


def test_compressed_archives_and_dots_in_names(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/train-000000.tar.gz').touch()
    with pytest.raises(SlotnbError, match='unpack them to .tar'):
        open_dataset(tmp_path / 'a', progress=False)
    shard(tmp_path / 'b.tar', {'v1.2/clip_0.5': whole('x')})
    with pytest.raises(SlotnbError, match='no other dot in the name'):
        TarShards(tmp_path / 'b.tar', progress=False)[0]
