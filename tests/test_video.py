"Videos: the very frame that was asked for, upright, and every file that is none."

import struct
import sys
import numpy as np
import pytest
from slotnb.core import SlotnbError

av = pytest.importorskip('av')
from slotnb.formats.video import VideoFrames

RNG = np.random.default_rng(0)
FRAMES = [
    np.full((48, 64, 3), 20 + 7 * i, np.uint8) for i in range(30)
]  # its brightness is its number, whatever a codec does to it


def number(image):
    return round((float(image.mean()) - 20) / 7)


def film(path, codec='libx264', pix_fmt='yuv420p', frames=FRAMES, rate=10, times=None, **options):
    with av.open(str(path), 'w') as c:
        s = c.add_stream(codec, rate=rate, options=options)
        s.height, s.width = frames[0].shape[:2]
        s.pix_fmt = pix_fmt
        s.bit_rate = 4_000_000
        for i, f in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(f), format='rgb24')
            if times:
                frame.pts = times[i]
            c.mux(s.encode(frame))
        c.mux(s.encode())
    return path


@pytest.mark.parametrize(
    'name, codec, options',
    [
        ('a.mp4', 'libx264', dict(g='12', bf='3')),
        ('b.avi', 'mpeg4', dict(g='7', bf='2')),
        ('c 机.MKV', 'libx264', dict(g='250', bf='3')),
        ('d.webm', 'libvpx-vp9', dict(g='8')),
        ('e.mpg', 'mpeg2video', dict(g='12', bf='2')),
    ],
)
def test_any_frame_in_any_order(tmp_path, name, codec, options):
    ds = VideoFrames(film(tmp_path / name, codec, rate=25, **options), max_frames=0, progress=False)
    assert len(ds) == 30 and ds.scenes == [name.rsplit('.', 1)[0]] and not ds.has_ground_truth
    assert [number(s.image) for s in ds] == [s.frame for s in ds] == list(range(30))
    for i in [*RNG.permutation(30).tolist(), 5, 5, 6, 4]:
        assert number(ds[i].image) == i
    s = ds[3]
    assert s.segmentation is None and s.instances == [] and s.path == tmp_path / name


def test_uneven_times(tmp_path):
    "A telephone films faster when it is bright."
    times = np.cumsum(RNG.integers(1, 9, 30)).tolist()
    ds = VideoFrames(film(tmp_path / 'a.mkv', rate=100, times=times, g='12', bf='2'), max_frames=0, progress=False)
    assert [number(ds[i].image) for i in (29, 0, 13, 14, 12)] == [29, 0, 13, 14, 12]


def test_a_stream_without_times(tmp_path):
    "Raw H.264 has none; frames are then counted from the start."
    ds = VideoFrames(film(tmp_path / 'a.h264', g='12', bf='2').rename(tmp_path / 'a.mpg'), max_frames=0, progress=False)
    assert len(ds) == 30 and [number(ds[i].image) for i in (17, 18, 3, 29)] == [17, 18, 3, 29]


def test_lossless_is_exact_and_max_frames_counts_a_file(tmp_path):
    noise = [RNG.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(5)]
    for n in 'ba':
        film(tmp_path / f'{n}.mkv', 'ffv1', 'bgr0', noise)
    for m, want in ((1, 2), (3, 6), (0, 10), (None, 10), (99, 10)):
        ds = VideoFrames(tmp_path, max_frames=m, progress=False)
        assert len(ds) == want and ds.scenes == ['a', 'b']
        for s in ds:
            assert (s.image == noise[s.frame]).all()
    with pytest.raises(SlotnbError, match='max_frames is -1'):
        VideoFrames(tmp_path, max_frames=-1)


@pytest.mark.parametrize(
    'matrix, back', [((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), -1), ((1, 0, 0, 1), 0)]
)
def test_the_matrix_of_the_file_turns_it_upright(tmp_path, matrix, back):
    "The matrix as QuickTime defines it: a, b, c, d send (x, y), y down, to (ax + cy, bx + dy)."
    picture = np.zeros((48, 64, 3), np.uint8)
    picture[:16, :32] = 255
    picture[32:, 48:, 0] = 200
    path = film(tmp_path / 'a.mp4', frames=[np.rot90(picture, back)] * 3, crf='1')
    data = bytearray(path.read_bytes())
    at = data.index(b'tkhd') + 44
    a, b, c, d = (v << 16 for v in matrix)
    data[at : at + 36] = struct.pack('>9i', a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    s = VideoFrames(path)[0]
    assert (
        s.rotated == (back != 0)
        and s.image.shape == picture.shape
        and np.abs(s.image.astype(int) - picture).mean() < 12
    )


BAD = {'empty.mp4': b'', 'words.mp4': b'hello' * 99, 'half.mp4': None}


@pytest.mark.parametrize('max_frames', [1, 0])
def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path, max_frames):
    good = film(tmp_path / 'good.mp4')
    for name, data in BAD.items():
        (tmp_path / name).write_bytes(good.read_bytes()[:900] if data is None else data)
    (tmp_path / 'loop.mp4').symlink_to(tmp_path / 'loop.mp4')
    (tmp_path / 'folder.mp4').mkdir()
    (tmp_path / '.hidden.mp4').touch()
    with av.open(str(tmp_path / 'sound.mp4'), 'w') as c:
        s = c.add_stream('aac', rate=8000)
        f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format='fltp', layout='mono')
        f.rate = 8000
        c.mux(s.encode(f))
        c.mux(s.encode())
    names = [*BAD, 'loop.mp4', 'folder.mp4', 'sound.mp4']
    for name in names:
        with pytest.raises(SlotnbError) as e:
            VideoFrames(tmp_path, max_frames=max_frames, progress=False).check(
                progress=False
            ) if name == 'empty.mp4' else next(
                VideoFrames.read(ds, x)
                for ds in [VideoFrames(tmp_path, max_frames=max_frames, progress=False)]
                for x in ds.entries
                if x.where.name == name
            )
        assert '\n' not in str(e.value) and name in str(e.value), e.value
    rest = VideoFrames(tmp_path, max_frames=max_frames, skip_broken=True, progress=False)
    assert rest.scenes == ['good'] and len(rest.skipped) == len(names)


def test_cut_in_the_middle(tmp_path):
    "A file whose index comes first can be opened although its end is missing; the frames that are gone are missed."
    path = film(tmp_path / 'a.mkv', 'ffv1', 'bgr0', [RNG.integers(0, 255, (48, 64, 3), np.uint8) for _ in range(9)])
    ds = VideoFrames(path, max_frames=0, progress=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(SlotnbError, match='a.mkv'):
        ds.check(progress=False)
    path.unlink()
    with pytest.raises(SlotnbError, match='a.mkv is missing'):
        ds[0]


def test_without_pyav_it_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / 'a.mp4').touch()
    monkeypatch.setitem(sys.modules, 'av', None)
    with pytest.raises(SlotnbError, match=r"pip install 'slotnb\[video\]'"):
        VideoFrames(tmp_path)


def test_folders(tmp_path):
    (tmp_path / 'train/day 1').mkdir(parents=True)
    film(tmp_path / 'train/day 1/a.mp4')
    assert VideoFrames(tmp_path, 'train').scenes == ['day 1/a']
    (tmp_path / 'train/day 1/a.mov').touch()
    for args, words in (
        ((tmp_path, 'test'), 'it holds train'),
        ((tmp_path, 'train'), 'differ only in their ending'),
        ((tmp_path / 'nowhere',), 'does not exist'),
        ((tmp_path / 'train/day 1/a.mp4', 'test'), 'is one video'),
    ):
        with pytest.raises(SlotnbError, match=words):
            VideoFrames(*args)
    (tmp_path / 'train/day 1/a.mov').unlink()
    (tmp_path / 'train/day 1/a.mp4').unlink()
    with pytest.raises(SlotnbError, match='holds no video'):
        VideoFrames(tmp_path, 'train')
