"A folder of pictures: every kind of file that people bring, with masks or without."

import errno
import os
import numpy as np
import pytest
from PIL import Image
from slotnb.core import SlotnbError, read_json
from slotnb.data import decode_image, read_image, read_segmentation
from slotnb.formats.detect import open_dataset, open_part
from slotnb.formats.images import ImageFolder

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (12, 20, 3), np.uint8)
SEG = np.zeros((12, 20), np.uint8)
SEG[2:6, 3:9] = 1
SEG[7:, 12:] = 2


def turned(tag=6):
    exif = Image.Exif()
    exif[0x112] = tag
    return exif


def png16(path):
    "A PNG of 16 bits per channel, which Pillow reads but can't write."
    import struct
    import zlib

    chunk = lambda kind, data: struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    rows = b''.join(b'\0' + RNG.integers(0, 65535, 20 * 3, np.uint16).tobytes() for _ in range(12))
    path.write_bytes(
        b'\x89PNG\r\n\x1a\n'
        + chunk(b'IHDR', struct.pack('>IIBBBBB', 20, 12, 16, 2, 0, 0, 0))
        + chunk(b'IDAT', zlib.compress(rows))
        + chunk(b'IEND', b'')
    )


BAD = {  # what the file is: how it is made, and words of the message
    'CMYK': (lambda p: Image.fromarray(np.zeros((12, 20, 4), np.uint8), 'CMYK').save(p, 'JPEG'), 'is of mode CMYK'),
    '16-bit grey': (lambda p: Image.fromarray(np.full((12, 20), 999, np.uint16)).save(p, 'PNG'), '16 bits per channel'),
    '16-bit RGB': (png16, '16 bits per channel'),
    'float': (lambda p: Image.fromarray(np.zeros((12, 20), np.float32)).save(p, 'TIFF'), 'is of mode F'),
    'empty': (lambda p: p.touch(), 'it is empty'),
    'text': (lambda p: p.write_text('hello'), 'it is not an image'),
    'half': (lambda p: (Image.fromarray(RGB).save(p, 'PNG'), p.write_bytes(p.read_bytes()[:300])), 'is it truncated'),
    'folder': (lambda p: p.mkdir(), 'is a folder'),
    'symlink loop': (lambda p: p.symlink_to(p), 'leads back to itself'),
    'symlink to nothing': (lambda p: p.symlink_to('gone.png'), 'is missing'),
}


def one_sentence(e, *words):
    text = str(e.value)
    assert '\n' not in text and 'Traceback' not in text, text
    for w in words:
        assert w in text, text


@pytest.mark.parametrize('what', BAD)
def test_what_cannot_be_read_is_named_and_the_rest_is_read(tmp_path, what):
    make, words = BAD[what]
    for name in 'a', 'c':
        Image.fromarray(RGB).save(tmp_path / f'{name}.png')
    make(tmp_path / 'b 机.png')
    with pytest.raises(SlotnbError) as e:
        ImageFolder(tmp_path).check(progress=False)
    one_sentence(e, 'b 机.png', words)
    rest = ImageFolder(tmp_path, skip_broken=True, progress=False)
    assert (
        rest.scenes == ['a', 'c'] and len(rest.skipped) == 1 and words in rest.skipped[0] and '1 broken' in repr(rest)
    )


def test_no_permission(tmp_path, monkeypatch):
    "As the system says it; root may read everything, so the refusal is played."

    def refuse(*a, **k):
        raise PermissionError(errno.EACCES, 'Permission denied')

    Image.fromarray(RGB).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'open', refuse)
    with pytest.raises(SlotnbError, match=r'a.png may not be read; allow it with chmod'):
        read_image(tmp_path / 'a.png')


@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'L', 'LA', 'P', '1'])
def test_eight_bits_are_read_exactly(tmp_path, mode):
    im = Image.fromarray(RGB).quantize(17) if mode == 'P' else Image.fromarray(RGB).convert(mode)
    im.save(tmp_path / 'a.png')
    want = np.asarray(im.convert('RGB')) if mode in 'RGBAP' else np.asarray(im.convert('L'))[..., None].repeat(3, -1)
    assert (read_image(tmp_path / 'a.png') == want).all() and read_image(tmp_path / 'a.png').dtype == np.uint8


@pytest.mark.parametrize('tag', range(1, 9))
def test_exif_turns_the_picture_upright(tmp_path, tag):
    back = {
        1: lambda x: x,
        2: np.fliplr,
        3: lambda x: np.rot90(x, 2),
        4: np.flipud,
        5: lambda x: x.swapaxes(0, 1),
        6: np.rot90,
        7: lambda x: np.rot90(x, 2).swapaxes(0, 1),
        8: lambda x: np.rot90(x, -1),
    }[tag]
    Image.fromarray(np.ascontiguousarray(back(RGB))).save(tmp_path / 'a.png', exif=turned(tag))
    image, rotated = decode_image(tmp_path / 'a.png')
    assert (image == RGB).all() and rotated == (tag > 1)


def test_a_turned_picture_fits_its_upright_mask(tmp_path):
    Image.fromarray(np.rot90(RGB).copy()).save(tmp_path / 'a.png', exif=turned())
    (tmp_path / 'masks').mkdir()
    Image.fromarray(SEG).save(tmp_path / 'masks/a.png')
    s = ImageFolder(tmp_path)[0]
    assert s.image.shape[:2] == s.segmentation.shape == (12, 20) and s.rotated
    Image.fromarray(np.rot90(SEG).copy()).save(tmp_path / 'masks/a.png')
    with pytest.raises(SlotnbError) as e:
        ImageFolder(tmp_path)[0]
    one_sentence(e, 'masks/a.png is 12x20 pixels, its image 20x12')


def test_pictures_from_memory_have_the_same_messages(tmp_path):
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    data = (tmp_path / 'a.png').read_bytes()
    assert (read_image('x.tar/a.png', data) == RGB).all()
    for bad, words in ((b'', 'it is empty'), (data[:300], 'is it truncated'), (b'hello', 'it is not an image')):
        for read in read_image, read_segmentation:
            with pytest.raises(SlotnbError) as e:
                read('x.tar/a.png', bad)
            one_sentence(e, 'x.tar/a.png', words)


def test_masks_are_found_by_name_and_renumbered(tmp_path):
    for p in (
        'images/b/x 1.JPG',
        'images/a.WebP',
        'masks/b/x 1.png',
        'masks/a.png',
        'images/.hidden.png',
        'images/.dir/y.png',
        'notes.txt',
    ):
        (tmp_path / p).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / p).touch()
    for p in 'b/x 1.JPG', 'a.WebP':
        Image.fromarray(RGB).save(tmp_path / 'images' / p)
    Image.fromarray(SEG * 100).save(tmp_path / 'masks/a.png')
    Image.fromarray((SEG == 2).astype('uint8') * 255).convert('1').save(tmp_path / 'masks/b/x 1.png')
    for root in tmp_path, tmp_path / 'images':  # opened from above, or directly
        a, b = ImageFolder(root).check(progress=False)
        assert (a.name, b.name) == ('a', 'b/x 1') and a.materials == ['', ''] and b.materials == ['']
        assert (
            (a.segmentation == SEG).all()
            and (b.segmentation == (SEG == 2)).all()
            and [i['mask_id'] for i in a.instances] == [100, 200]
        )


def test_a_colour_mask_is_refused(tmp_path):
    (tmp_path / 'masks').mkdir()
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    Image.fromarray(RGB).save(tmp_path / 'masks/a.png')
    with pytest.raises(SlotnbError, match='masks/a.png is an image of mode RGB, not instance numbers'):
        ImageFolder(tmp_path)[0]


def test_half_a_truth_is_refused(tmp_path):
    (tmp_path / 'masks').mkdir()
    for n in 'abc':
        Image.fromarray(RGB).save(tmp_path / f'{n}.png')
    Image.fromarray(SEG).save(tmp_path / 'masks/b.png')
    with pytest.raises(SlotnbError) as e:
        ImageFolder(tmp_path)
    one_sentence(e, 'a.png has no mask', '2 of 3')
    rest = ImageFolder(tmp_path, skip_broken=True, progress=False)
    assert rest.scenes == ['b'] and len(rest.skipped) == 2


def test_two_files_of_one_name(tmp_path):
    for n in 'a.png', 'a.jpg':
        Image.fromarray(RGB).save(tmp_path / n)
    with pytest.raises(SlotnbError, match='a.jpg and a.png differ only in their ending'):
        ImageFolder(tmp_path)


def test_splits_are_sub_folders(tmp_path):
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    assert len(ImageFolder(tmp_path)) == len(ImageFolder(tmp_path, 'train')) == 1
    with pytest.raises(SlotnbError, match="make the sub-folders train and test"):
        ImageFolder(tmp_path, 'test')
    (tmp_path / 'test').mkdir()
    Image.fromarray(RGB).save(tmp_path / 'test/b.png')
    assert ImageFolder(tmp_path, 'test').scenes == ['b']
    with pytest.raises(SlotnbError, match="has no split 'train'; it holds test"):
        ImageFolder(tmp_path, 'train')  # or b would be trained on
    with pytest.raises(SlotnbError, match='does not exist'):
        ImageFolder(tmp_path / 'nowhere')
    (tmp_path / 'val').mkdir()
    with pytest.raises(SlotnbError, match='holds no image'):
        ImageFolder(tmp_path, 'val')


def test_pipes_and_the_home_folder(tmp_path, monkeypatch):
    "A pipe called .png is not opened, which would wait for ever; ~ is the home folder."
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'photos').mkdir()
    Image.new('RGB', (8, 8)).save(tmp_path / 'photos/a.png')
    os.mkfifo(tmp_path / 'photos/b.png')
    os.mkfifo(tmp_path / 'c.mp4')
    os.mkfifo(tmp_path / 'd.json')
    data = open_dataset('~/photos', None, progress=False)
    assert data.scenes == ['a'] and data[0].image.shape == (8, 8, 3)
    with pytest.raises(SlotnbError, match='no regular file'):
        open_dataset('~/c.mp4', progress=False)
    with pytest.raises(SlotnbError, match='no regular file'):
        read_json(tmp_path / 'd.json')
    with pytest.raises(SlotnbError, match='data_dir is empty'):
        open_dataset('', progress=False)


@pytest.mark.parametrize('mask', ['labels/a.png', 'Annotations/480p/a.png', 'Masks/a.png', 'a_mask.png', 'a_flat.png'])
def test_masks_of_other_layouts_are_not_taken_for_photographs(tmp_path, mask):
    "CLEVRTex, DAVIS and others: one sentence instead of twice as many images."
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    assert len(ImageFolder(tmp_path)) == 1
    (tmp_path / mask).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(SEG).save(tmp_path / mask)
    with pytest.raises(SlotnbError, match='looks like a mask'):
        ImageFolder(tmp_path)
    Image.fromarray(RGB).save(tmp_path / 'b_mask.png')  # nothing beside it that it could be the mask of
    (tmp_path / mask).unlink()
    assert len(ImageFolder(tmp_path)) == 2


@pytest.mark.parametrize(
    'folders', [('train2017', 'val2017'), ('training', 'validation'), ('images/train', 'images/val')]
)
def test_splits_under_other_names_are_not_merged(tmp_path, folders):
    "COCO, ADE20K and others: one sentence that names them; without a split everything is read."
    for name in folders:
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / name / 'a.png')
    with pytest.raises(SlotnbError, match=folders[1].split('/')[-1]):
        open_part(tmp_path, 'train', progress=False)
    with pytest.raises(SlotnbError, match="no split 'test'|validation"):
        open_part(tmp_path, 'test', progress=False)
    assert len(open_dataset(tmp_path, None, progress=False)) == 2


def test_masks_beside_the_images_under_another_name(tmp_path):
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
    Image.fromarray(RGB).save(tmp_path / 'images/a.png')
    (tmp_path / 'labels/a.txt').touch()  # boxes, for example
    assert len(ImageFolder(tmp_path)) == 1
    Image.fromarray(SEG).save(tmp_path / 'labels/a.png')
    with pytest.raises(SlotnbError, match="labels' looks like masks"):
        ImageFolder(tmp_path)
