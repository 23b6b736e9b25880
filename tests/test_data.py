"The reader on hand-made folders: what Kubric may write, and every way in which a scene may be broken."

import json
import numpy as np
import pytest
from PIL import Image
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders, instance_table, read_image, read_scene

SEG = np.kron(np.array([[0, 1], [2, 0]], np.uint8), np.ones((16, 24), np.uint8))


def write(folder, seg=SEG, mode='P', frames=1, rgba=True):
    "One scene with two objects, in Kubric's layout."
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(frames):
        Image.fromarray(rng.integers(0, 255, (*seg.shape, 4 if rgba else 3), np.uint8)).save(
            folder / f'rgba_{n:05}.png'
        )
        im = Image.fromarray(seg).convert(mode) if mode != 'P' else Image.fromarray(seg)
        if mode == 'P':
            im.putpalette(rng.permutation(768).astype(np.uint8).tolist())
        im.save(folder / f'segmentation_{n:05}.png')
    objects = [
        dict(material='Metal', shape='cube', size_label='small', size=0.7, color=[1, 0, 0], color_label='red'),
        dict(material_label='rubber', shape_label='sphere', size='large', color='blue'),
    ]
    (folder / 'metadata.json').write_text(json.dumps(dict(metadata={}, camera={}, instances=objects)))
    return folder


@pytest.mark.parametrize('mode', ['P', 'L', 'I;16'])
def test_ids_survive_every_way_to_store_them(tmp_path, mode):
    s = read_scene(write(tmp_path / 'train/scene_0000', mode=mode) / 'rgba_00000.png')
    assert s.segmentation.dtype == np.int64 and (s.segmentation == SEG).all() and s.image.shape == (32, 48, 3)


def test_both_of_kubrics_spellings_are_read(tmp_path):
    write(tmp_path / 'train/scene_0000')
    t = instance_table(KubricFolders(tmp_path))
    assert t.material.tolist() == ['metal', 'rubber'] and t['shape'].tolist() == ['cube', 'sphere']
    assert (
        t['size'].tolist() == ['small', 'large']
        and t.color.tolist() == ['red', 'blue']
        and t.pixels.tolist() == [16 * 24] * 2
    )


def test_order_frames_and_digests(tmp_path):
    for name in ('scene_0002', 'scene_0000', 'scene_0001'):
        write(tmp_path / 'test' / name, frames=3)
    (tmp_path / 'test/.cache').mkdir()
    (tmp_path / 'test/notes.txt').write_text('not a scene')
    ds = KubricFolders(tmp_path, 'test', max_frames=2).check(progress=False)
    assert [(s.name, s.frame) for s in ds] == [(f'scene_000{i}', f) for i in range(3) for f in range(2)]
    assert len(KubricFolders(tmp_path, 'test', 0)) == len(KubricFolders(tmp_path, 'test', None)) == 9
    assert ds[0].image_digest() == ds[2].image_digest() != ds[1].image_digest()  # the pixels count, not the name
    with pytest.raises(IndexError):
        ds[6]


def test_frames_go_by_number(tmp_path):
    "Gaps, any number of digits, and a file that only looks like a frame."
    for scene, numbers in dict(a=['00007', '00010', '100000', '8'], b=['00003']).items():
        folder = write(tmp_path / 'train' / scene)
        for n in numbers:
            for kind in 'rgba', 'segmentation':
                (folder / f'{kind}_00000.png').with_name(f'{kind}_{n}.png').write_bytes(
                    (folder / f'{kind}_00000.png').read_bytes()
                )
        for kind in 'rgba', 'segmentation':
            (folder / f'{kind}_00000.png').unlink()
        (folder / 'rgba_preview.png').touch()
    for m, want in ((0, [7, 8, 10, 100000, 3]), (2, [7, 8, 3]), (1, [7, 3])):
        ds = KubricFolders(tmp_path, max_frames=m).check(progress=False)
        assert [s.frame for s in ds] == want and ds.scenes == ['a', 'b'] and ds[0].path.name == 'rgba_00007.png'


@pytest.mark.parametrize(
    'how, words',
    [
        (lambda f: f.touch(), 'it is empty'),
        (lambda f: f.mkdir(), 'is a folder'),
        (lambda f: f.symlink_to(f), 'leads back to itself'),
        (lambda f: Image.fromarray(np.zeros((32, 48, 4), np.uint8), 'CMYK').save(f, 'TIFF'), 'mode CMYK'),
    ],
)
@pytest.mark.parametrize('name', ['rgba_00000.png', 'segmentation_00000.png', 'metadata.json'])
def test_what_lies_where_a_file_should(tmp_path, how, words, name):
    for i in range(3):
        write(tmp_path / f'train/scene_{i:04}')
    path = tmp_path / 'train/scene_0001' / name
    path.unlink()
    how(path)
    if name == 'metadata.json' and words in ('it is empty', 'mode CMYK'):
        words = 'not valid JSON' if words == 'it is empty' else 'is no text in UTF-8'
    rest = KubricFolders(tmp_path, skip_broken=True, progress=False)
    assert (
        rest.scenes == ['scene_0000', 'scene_0002']
        and len(rest.skipped) == 1
        and words in rest.skipped[0]
        and str(path) in rest.skipped[0]
        and '\n' not in rest.skipped[0]
    )


@pytest.mark.parametrize('kind', ['rgba', 'segmentation'])
def test_a_png_cut_anywhere_is_named(tmp_path, kind):
    folder = write(tmp_path / 'train/scene_0000')
    path = folder / f'{kind}_00000.png'
    whole = path.read_bytes()
    want = read_scene(
        folder / 'rgba_00000.png'
    )  # only a cut through the end mark and the last checksums may pass unseen
    for n in range(0, len(whole), 1 if len(whole) < 2000 else 37):
        path.write_bytes(whole[:n])
        try:
            got = read_scene(folder / 'rgba_00000.png')
        except SlotnbError as e:
            assert path.name in str(e) and str(e).count('\n') == 0
        else:
            assert (
                n > len(whole) - 24
                and (got.image == want.image).all()
                and (got.segmentation == want.segmentation).all()
            )


def metadata(folder, text):
    (folder / 'metadata.json').write_text(text)


BROKEN = {
    'metadata.json is missing': lambda f: (f / 'metadata.json').unlink(),
    'not valid JSON': lambda f: metadata(f, '{"instances": ['),
    "no list 'instances'": lambda f: metadata(f, '[]'),
    "instance 0 has neither 'material'": lambda f: metadata(
        f, '{"instances": [{"shape": "cube"}, {"material": "metal"}]}'
    ),
    'lists 1 instances, but its segmentation has the id 2': lambda f: metadata(
        f, '{"instances": [{"material": "metal"}]}'
    ),
    'segmentation_00000.png is missing': lambda f: (f / 'segmentation_00000.png').unlink(),
    'must have the same size': lambda f: Image.fromarray(SEG[::2]).save(f / 'segmentation_00000.png'),
    'not instance numbers': lambda f: Image.open(f / 'rgba_00000.png').save(f / 'segmentation_00000.png'),
    'rgba_00000.png is missing': lambda f: (f / 'rgba_00000.png').unlink(),
}


@pytest.mark.parametrize('message', BROKEN)
def test_each_broken_scene_is_one_sentence_that_names_it(tmp_path, message):
    for i in range(3):
        write(tmp_path / f'train/scene_{i:04}')
    BROKEN[message](tmp_path / 'train/scene_0001')
    with pytest.raises(SlotnbError, match=message) as e:
        KubricFolders(tmp_path).check(progress=False)
    assert 'scene_0001' in str(e.value) and '\n' not in str(e.value)


def test_check_counts_what_else_is_broken(tmp_path):
    for i in range(4):
        write(tmp_path / f'train/scene_{i:04}')
    for i in (1, 3):
        (tmp_path / f'train/scene_{i:04}/metadata.json').unlink()
    with pytest.raises(SlotnbError, match=r'scene_0001.*\(1 more of 4'):
        KubricFolders(tmp_path).check(progress=False)


def test_wrong_folders_say_what_is_there(tmp_path):
    write(tmp_path / 'data/train/scene_0000')
    (tmp_path / 'data/empty').mkdir()
    for args, message in (
        ((tmp_path / 'nowhere',), 'does not exist'),
        ((tmp_path / 'data', 'valid'), 'it holds empty, train'),
        ((tmp_path / 'data', 'empty'), 'holds no scene'),
        ((tmp_path / 'data', 'train', -1), 'max_frames is -1'),
    ):
        with pytest.raises(SlotnbError, match=message):
            KubricFolders(*args)


def test_a_file_that_is_no_image(tmp_path):
    (tmp_path / 'a.png').write_text('hello')
    with pytest.raises(SlotnbError, match='a.png cannot be read'):
        read_image(tmp_path / 'a.png')


def test_scenes_without_any_material_are_read(tmp_path):
    "MOVi-C and MOVi-D: the materials are unknown."
    write(tmp_path / 'train/scene_0000')
    metadata(tmp_path / 'train/scene_0000', '{"instances": [{"shape": "cube"}, {"shape": "cube"}]}')
    assert KubricFolders(tmp_path)[0].materials == ['', '']
