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
    Image.fromarray(np.rot90(SEG).copy()).save(tmp_path / 'masks/a.png')  # drawn on the picture as it is stored
    assert (ImageFolder(tmp_path)[0].segmentation == SEG).all()
    Image.fromarray(SEG[:, 1:]).save(tmp_path / 'masks/a.png')
    with pytest.raises(SlotnbError) as e:
        ImageFolder(tmp_path)[0]
    one_sentence(e, 'masks/a.png is 19x12 pixels, its image 20x12')


@pytest.mark.parametrize('tag, size', [(3, (12, 20)), (6, (12, 12))])
def test_a_turned_picture_whose_mask_fits_both_ways_is_refused(tmp_path, tag, size):
    "Upside down or square: the size does not tell whether the mask is turned, unless it has a tag of its own."
    (tmp_path / 'masks').mkdir()
    Image.fromarray(RGB[: size[0], : size[1]]).save(tmp_path / 'a.png', exif=turned(tag))
    mask = Image.fromarray(SEG[: size[0], : size[1]])
    mask.save(tmp_path / 'masks/a.png')
    with pytest.raises(SlotnbError) as e:
        ImageFolder(tmp_path)[0]
    one_sentence(e, 'a.png is stored turned', 'save the image upright')
    mask.save(tmp_path / 'masks/a.png', exif=turned(tag))
    upright = {3: np.rot90(SEG, 2), 6: np.rot90(SEG[:12, :12], -1)}[tag]
    assert (ImageFolder(tmp_path)[0].segmentation == upright).all()


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


def test_a_photograph_as_mask_is_refused(tmp_path):
    (tmp_path / 'masks').mkdir()
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    Image.fromarray(RGB).save(tmp_path / 'masks/a.png')
    with pytest.raises(SlotnbError, match='masks/a.png holds 240 numbers, as soft, JPEG or resized masks do'):
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


@pytest.mark.parametrize('mask', ['labels/a.png', 'Annotations/480p/a.png', 'gtFine/a.png', 'a_seg.png', 'ids/a.png'])
def test_masks_of_other_layouts_are_not_taken_for_photographs(tmp_path, mask):
    "One sentence instead of twice as many images, also where only the few colors tell."
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    assert len(ImageFolder(tmp_path)) == 1
    (tmp_path / mask).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(SEG).save(tmp_path / mask)
    with pytest.raises(SlotnbError, match='looks like a mask'):
        ImageFolder(tmp_path)
    Image.fromarray(RGB).save(tmp_path / 'b_mask.png')  # nothing beside it that it could be the mask of
    (tmp_path / mask).unlink()
    assert len(ImageFolder(tmp_path)) == 2


LAYOUTS = {  # the image and its masks
    'masks': ('b/a.png', 'masks/b/a.png'),
    'Masks': ('a.png', 'Masks/a_mask.png'),
    'images/train': ('images/train/a.png', 'masks/train/a.png'),
    'suffix': ('a.png', 'a_mask.png'),
    'CLEVRTex': ('0/a.png', '0/a_flat.png'),
    'DAVIS': ('JPEGImages/480p/bear/a.jpg', 'Annotations/480p/bear/a.png'),
    'VOC': ('JPEGImages/a.jpg', 'SegmentationObject/a.png'),
    'suffix of the image': ('a.jpg', 'masks/a.jpg.png'),
    'one file per object, numbered': ('a.png', 'masks/a_1.png', 'masks/a_obj2.png'),
    'one file per object': ('images/a.png', 'masks/a/x.png', 'masks/a/y.png'),
    'a folder per scene': ('s/images/a.png', 's/masks/x.png', 's/masks/y.png'),
    'NFC': ('u\u0308.png', 'masks/\u00fc.png'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_of_masks(tmp_path, layout):
    image, *masks = LAYOUTS[layout]
    for name in (image, *masks):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB).save(tmp_path / image)
    for i, name in enumerate(masks, 1):
        Image.fromarray(SEG if len(masks) == 1 else 255 * (SEG == i).astype(np.uint8)).save(tmp_path / name)
    (sample,) = open_dataset(tmp_path, 'train', progress=False)
    assert (sample.segmentation == SEG).all() and len(sample.instances) == 2
    if 'asks/' in masks[0] and len(masks) == 1:
        (tmp_path / masks[0]).rename((tmp_path / masks[0]).with_name('other.png'))
        with pytest.raises(SlotnbError, match='has no mask'):
            open_dataset(tmp_path, 'train', progress=False)


def test_an_image_of_one_object_among_images_of_several(tmp_path):
    "One file per object is 0 and 255 in all of them, also where there is only one and where others overlap."
    for name, objects in dict(a=[SEG == 1, SEG == 2], b=[SEG == 1], c=[SEG > 0, SEG == 2]).items():
        (tmp_path / f'masks/{name}').mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / f'{name}.png')
        for i, mask in enumerate(objects):
            Image.fromarray(255 * mask.astype(np.uint8)).save(tmp_path / f'masks/{name}/{i}.png')
    a, b, c = ImageFolder(tmp_path, progress=False)
    assert (a.segmentation == SEG).all() and (b.segmentation == (SEG == 1)).all()
    assert (c.segmentation == np.where(SEG == 2, -1, SEG.astype(int))).all() and [
        len(s.instances) for s in (a, b, c)
    ] == [2, 1, 1]


def test_suffixes_of_images_and_masks(tmp_path):
    "Cityscapes in one folder: both have a suffix, and the masks show by their few colors."
    for i in range(2):
        Image.fromarray(RGB).save(tmp_path / f'x_{i}_leftImg8bit.png')
        Image.fromarray(RGB).save(tmp_path / f'x_{i}_rightImg8bit.png')
    assert len(ImageFolder(tmp_path)) == 4
    for i in range(2):
        Image.fromarray(SEG).save(tmp_path / f'x_{i}_gtFine_instanceIds.png')
    with pytest.raises(SlotnbError, match='instanceIds.png looks like a mask'):
        ImageFolder(tmp_path)


def test_what_lies_beside_masks_is_named(tmp_path):
    "The other pictures of CLEVRTex, masks without an image, annotations in JSON; two masks of one image are refused."
    for name in ('a.png', 'a_albedo.png', 'a_depth.png', 'b.png'):
        Image.fromarray(RGB).save(tmp_path / name)
    for name in ('a_flat.png', 'b_flat.png'):
        Image.fromarray(SEG).save(tmp_path / name)
    data = ImageFolder(tmp_path)
    assert data.scenes == ['a', 'b'] and data.unread == {'_albedo.png': 1, '_depth.png': 1}
    Image.fromarray(SEG).save(tmp_path / 'a_mask.png')
    with pytest.raises(SlotnbError, match='are masks of one image'):
        ImageFolder(tmp_path)
    (tmp_path / 'd/masks').mkdir(parents=True)
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations/instances.json').touch()
    Image.fromarray(RGB).save(tmp_path / 'd/a.png')
    for name in 'abc':
        Image.fromarray(SEG).save(tmp_path / f'd/masks/{name}.png')
    assert ImageFolder(tmp_path / 'd').unread == {'annotations/*.json': 1, 'masks without an image': 2}


def test_objects_in_one_file_each_may_not_hold_two_and_overlaps_are_void(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'masks/a').mkdir(parents=True)
    Image.fromarray(RGB).save(tmp_path / 'images/a.png')
    one, two = 255 * (SEG == 1).astype(np.uint8), 255 * (SEG == 2).astype(np.uint8)
    two[3, 3:5] = 255
    for name, mask in dict(x=one, y=two).items():
        Image.fromarray(mask).save(tmp_path / f'masks/a/{name}.png')
    seg = ImageFolder(tmp_path)[0].segmentation
    want = SEG.astype(int)
    want[3, 3:5] = -1
    assert (seg == want).all()
    Image.fromarray(SEG).save(tmp_path / 'masks/a/z.png')
    with pytest.raises(SlotnbError, match='z.png holds several objects'):
        ImageFolder(tmp_path)[0]


@pytest.mark.parametrize(
    'folders', [('train2017', 'val2017'), ('training', 'validation'), ('images/train', 'images/val'), ('train', 'val')]
)
def test_splits_under_other_names(tmp_path, folders):
    "COCO, ADE20K, CLEVR: a validation set is the test set if there is none, said in a remark; never merged into train."
    for i, name in enumerate(folders):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / name / f'{i}.png')
    train, test = (open_part(tmp_path, part, progress=False) for part in ('train', 'test'))
    assert train.scenes == ['0'] and test.scenes == ['1'] and not train.remarks
    assert folders[1].split('/')[-1] in test.remarks[0] and 'test' in test.remarks[0]
    assert len(open_dataset(tmp_path, None, progress=False)) == 2
    other = tmp_path / folders[0]
    other.rename(other.with_name('train1999'))
    (other.with_name('train2000')).mkdir()
    with pytest.raises(SlotnbError, match='may be train1999 or train2000'):
        open_part(tmp_path, 'train', progress=False)


def test_splits_that_lie_deeper_are_refused(tmp_path):
    for i, name in enumerate(('leftImg8bit/train/a', 'leftImg8bit/val/b')):
        (tmp_path / name).mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / name / f'{i}.png')
    with pytest.raises(SlotnbError) as e:
        open_part(tmp_path, 'train', progress=False)
    one_sentence(e, 'the splits train, val', 'put images and masks')


def test_lists_of_splits(tmp_path):
    "ImageSets of DAVIS: sequences; without test.txt the validation set is the test set."
    for seq in ('bear', 'cat'):
        (tmp_path / f'JPEGImages/480p/{seq}').mkdir(parents=True)
        (tmp_path / f'Annotations/480p/{seq}').mkdir(parents=True)
        Image.fromarray(RGB).save(tmp_path / f'JPEGImages/480p/{seq}/00000.jpg')
        Image.fromarray(SEG).save(tmp_path / f'Annotations/480p/{seq}/00000.png')
    (tmp_path / 'ImageSets/2017').mkdir(parents=True)
    (tmp_path / 'ImageSets/2017/train.txt').write_text('bear\n')
    (tmp_path / 'ImageSets/2017/val.txt').write_text('cat\n')
    parts = [open_part(tmp_path, part, progress=False) for part in ('train', 'test')]
    assert [p.scenes for p in parts] == [['480p/bear/00000'], ['480p/cat/00000']]
    assert (parts[0][0].segmentation == SEG).all() and not parts[0].unread


def test_several_pictures_in_one_file(tmp_path):
    "Pages and frames would be left out; the file is refused, a preview in a TIFF is not counted."
    pages = [Image.fromarray(np.roll(RGB, i, 0)) for i in range(3)]
    for name in ('a.tiff', 'a.webp', 'a.gif', 'a.png'):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(SlotnbError) as e:
            read_image(tmp_path / name)
        one_sentence(e, f'{name} holds 3 pictures')
    pages[1].encoderinfo = dict(tiffinfo={254: 1})
    pages[0].save(tmp_path / 'b.tiff', save_all=True, append_images=pages[1:2])
    assert (read_image(tmp_path / 'b.tiff') == RGB).all()


def test_folders_behind_links_are_read_once(tmp_path):
    (tmp_path / 'here/inner').mkdir(parents=True)
    (tmp_path / 'there').mkdir()
    Image.fromarray(RGB).save(tmp_path / 'here/inner/a.png')
    Image.fromarray(RGB).save(tmp_path / 'there/b.png')
    for name, target in dict(link='there', again='there', loop='here', up='.', twice='here/inner').items():
        (tmp_path / 'here' / name).symlink_to(tmp_path / target)
    (tmp_path / 'there/back').symlink_to(tmp_path / 'here')
    assert ImageFolder(tmp_path / 'here').scenes == ['again/b', 'inner/a']


def test_a_picture_above_pillows_limit_says_so(tmp_path, monkeypatch):
    Image.fromarray(RGB).save(tmp_path / 'a.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 100)
    with pytest.raises(SlotnbError) as e:
        read_image(tmp_path / 'a.png')
    one_sentence(e, 'a.png has more than', 'scale it down')


def test_masks_beside_the_images_under_another_name(tmp_path):
    for name in ('images', 'labels'):
        (tmp_path / name).mkdir()
    Image.fromarray(RGB).save(tmp_path / 'images/a.png')
    (tmp_path / 'labels/a.txt').touch()  # boxes, for example
    assert len(ImageFolder(tmp_path)) == 1
    Image.fromarray(SEG).save(tmp_path / 'labels/a.png')
    with pytest.raises(SlotnbError, match="labels' looks like masks"):
        ImageFolder(tmp_path)


def test_names_that_are_no_text_are_refused(tmp_path):
    for name in (b'\xff.png', 'ü.png'.encode()):
        Image.fromarray(RGB).save(open(tmp_path / os.fsdecode(name), 'wb'), 'PNG')
    with pytest.raises(SlotnbError) as e:
        open_dataset(tmp_path, progress=False)
    one_sentence(e, 'is no UTF-8 text; rename it')
    assert str(e.value).isprintable()


def test_a_folder_that_may_not_be_listed_is_named(tmp_path, monkeypatch):
    "As the system says it; root may list everything, so the refusal is played."
    (tmp_path / 'train/inner').mkdir(parents=True)
    Image.fromarray(RGB).save(tmp_path / 'train/a.png')
    real = os.scandir

    def refuse(path='.'):
        if 'inner' in str(path):
            raise PermissionError(errno.EACCES, 'Permission denied', str(path))
        return real(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    for read in (open_dataset, lambda p, progress: open_part(p, 'train', progress=progress)):
        with pytest.raises(SlotnbError, match='inner may not be read; allow it with chmod'):
            read(tmp_path, progress=False)


def test_thumbnails_of_file_servers_are_hidden(tmp_path):
    for name in ('a.jpg', '@eaDir/a.jpg/SYNOPHOTO_THUMB_XL.jpg', '__MACOSX/a.jpg', '#recycle/b.jpg'):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(tmp_path / name)
    data = ImageFolder(tmp_path)
    assert data.scenes == ['a'] and not data.unread


def test_a_heic_that_is_none_is_named_or_skipped(tmp_path):
    pytest.importorskip('pillow_heif')
    Image.fromarray(RGB).save(tmp_path / 'a.jpg')
    Image.fromarray(RGB).save(tmp_path / 'b.jfif', 'JPEG')
    (tmp_path / 'c.HEIC').write_bytes(b'\0\0\0\x18ftypheic\0\0\0\0mif1heic' + bytes(64))
    with pytest.raises(SlotnbError) as e:
        open_dataset(tmp_path, None, progress=False).check(progress=False)
    one_sentence(e, 'c.HEIC cannot be read')
    rest = open_dataset(tmp_path, None, skip_broken=True, progress=False)
    assert rest.scenes == ['a', 'b'] and 'c.HEIC' in rest.skipped[0]
