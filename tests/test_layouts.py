"Published data sets as people have them: COCO, panoptic, Cityscapes, ADE20K, Multi-Object Datasets; right or refused."

import gzip
import json
import pickle
import struct
import unicodedata
import zlib
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from slotnb.core import SlotnbError
from slotnb.formats.class_masks import ClassMasks
from slotnb.formats.coco import CocoFolder
from slotnb.formats.detect import has_no_splits, open_dataset, open_part
from slotnb.formats.multi_object import Inflated, MultiObjectRecords
from slotnb.formats.tfrecords import _messages, masked_crc
from slotnb.segment.files import Labeled, coco

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 255, (24, 32, 3), np.uint8)
SEG = np.zeros((24, 32), int)
SEG[2:10, 3:12] = 1
SEG[12:22, 14:30] = 2


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path / 'cache'))


def save(path, pixels=RGB, dtype=np.uint8, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype)).save(path, **options)


def one_sentence(call, *words):
    with pytest.raises(SlotnbError) as e:
        call()
    text = str(e.value)
    assert '\n' not in text and all(w in text for w in words), text


# ---- COCO


def polygon(y0, y1, x0, x1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def runs(mask):
    "Uncompressed RLE: lengths of runs of 0 and 1 in turns, column by column."
    flat = np.r_[0, mask.ravel('F').astype(int)]
    edges = np.flatnonzero(np.diff(flat))
    return np.diff(np.r_[0, edges, mask.size]).tolist()


DRAWN = {  # an annotation of object i
    'polygons': lambda i: (polygon(2, 10, 3, 12), polygon(12, 22, 14, 30))[i - 1],
    'RLE as a list': lambda i: dict(size=[24, 32], counts=runs(SEG == i)),
    'RLE as text': lambda i: dict(
        size=[24, 32], counts=coco_mask.encode(np.asfortranarray(SEG == i, np.uint8))['counts'].decode()
    ),
}


def labels(*names, drawn='polygons', **change):
    "COCO's JSON for pictures that all show the two objects."
    images = [dict(id=i, file_name=n, height=24, width=32) for i, n in enumerate(names)]
    made = [
        dict(id=2 * k + i, image_id=k, category_id=1, iscrowd=0, segmentation=DRAWN[drawn](i))
        for k in range(len(names))
        for i in (1, 2)
    ]
    return dict(images=images, annotations=made, categories=[dict(id=1, name='thing')]) | change


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize('drawn', DRAWN)
def test_objects_of_coco_are_drawn(tmp_path, drawn):
    save(tmp_path / 'a.png')
    write(tmp_path / 'instances.json', labels('a.png', drawn=drawn))
    (s,) = open_dataset(tmp_path, None, progress=False)
    assert (s.segmentation == SEG).all() and [i['category'] for i in s.instances] == ['thing'] * 2


COCO = {  # where the pictures of training and test are, the names in the JSON, and the files
    'published': (
        'train2017/{}.jpg val2017/{}.jpg',
        '{}.jpg',
        'annotations/instances_train2017.json annotations/instances_val2017.json',
    ),
    'images': (
        'images/train2017/{}.JPG images/val2017/{}.JPG',
        '{}.JPG',
        'annotations/instances_train2017.json annotations/instances_val2017.json',
    ),
    'beside the pictures': (
        'train/{}.jpg valid/{}.jpg',
        '{}.jpg',
        'train/_annotations.coco.json valid/_annotations.coco.json',
    ),
    'one folder of pictures': ('images/{}.png images/{}.png', '{}.png', 'train.json val.json'),
    'names with folders': ('data/x/{}.png data/y/{}.png', 'data/{split}/{}.png', 'train.json test.json'),
    'other folders in the names': ('train/{}.png val/{}.png', 'C:\\set\\{}.png', 'train.json val.json'),
    'other names of the split': ('images/training/{}.png images/testing/{}.png', '{}.png', 'train.json test.json'),
}


@pytest.mark.parametrize('layout', COCO)
def test_layouts_of_coco(tmp_path, layout):
    folders, name, files = (x.split(' ') if ' ' in x else x for x in COCO[layout])
    for split, folder, file in zip('xy', folders, files):
        names = [f'{split}{i}' for i in range(3)]
        for n in names:
            save(tmp_path / folder.format(n))
        write(tmp_path / file, labels(*(name.format(n, split=split) for n in names)))
    assert not has_no_splits(tmp_path)
    for part, split in dict(train='x', test='y').items():
        data = open_part(tmp_path, part, progress=False)
        assert [s.path.stem for s in data] == [f'{split}{i}' for i in range(3)] and data.kind == 'COCO annotations'
        assert all((s.segmentation == SEG).all() for s in data)
    one_sentence(lambda: open_dataset(tmp_path, None, progress=False), 'choose one')
    seen = open_dataset(tmp_path, None, progress=False, masks=False)  # all pictures, without the JSON
    assert len(seen) == 6 and all(s.segmentation is None for s in seen)


def test_coco_without_splits_holds_out_a_fifth(tmp_path):
    names = [f'{i}.png' for i in range(10)]
    for n in names:
        save(tmp_path / 'images/default' / n)
    write(tmp_path / 'annotations/instances_default.json', labels(*names))
    assert has_no_splits(tmp_path)
    parts = [open_part(tmp_path, part, progress=False) for part in ('train', 'test')]
    assert sum(map(len, parts)) == 10 and all((s.segmentation == SEG).all() for p in parts for s in p)


def test_crowds_and_overlaps_of_coco_are_void(tmp_path):
    content = labels('a.png')
    content['annotations'][0]['segmentation'] = polygon(2, 14, 3, 16)
    crowd = np.zeros((24, 32), bool)
    crowd[:6, 10:] = True
    content['annotations'].append(
        dict(id=9, image_id=0, category_id=1, iscrowd=1, segmentation=dict(size=[24, 32], counts=runs(crowd)))
    )
    save(tmp_path / 'a.png')
    write(tmp_path / 'instances.json', content)
    (s,) = open_dataset(tmp_path, None, progress=False)
    want = np.where(crowd, -1, 0)
    want[2:14, 3:16] = 1
    want[12:22, 14:30] = 2
    want[12:14, 14:16] = -1
    assert (s.segmentation == want).all() and len(s.instances) == 2


def test_a_picture_without_objects_and_a_turned_one(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6
    save(tmp_path / 'a.png', exif=exif)
    save(tmp_path / 'b.png')
    content = labels('a.png', 'b.png')
    content['annotations'] = content['annotations'][:2]
    write(tmp_path / 'instances.json', content)
    a, b = open_dataset(tmp_path, None, progress=False)
    assert (a.segmentation == np.rot90(SEG, -1)).all() and a.image.shape[:2] == a.segmentation.shape
    assert not b.segmentation.any() and b.instances == []


def test_names_of_coco_in_another_unicode_form(tmp_path):
    save(tmp_path / unicodedata.normalize('NFD', 'Küche.png'))
    write(tmp_path / 'instances.json', labels(unicodedata.normalize('NFC', 'Küche.png')))
    assert (open_dataset(tmp_path, None, progress=False)[0].segmentation == SEG).all()


def bent(content, **change):
    content['annotations'][0] |= change
    return content


WRONG = {  # the JSON for a.png and b.png, which exist, and words of the message
    'missing': (labels('a.png', 'b.png', 'c.png'), 'lists c.png'),
    'not listed': (labels('a.png'), "b.png is not in 'images'"),
    'no size': (labels('a.png', 'b.png') | dict(images=[dict(id=0, file_name='a.png')]), "no 'height' and 'width'"),
    'no name': (labels('a.png', 'b.png') | dict(images=[dict(id=0)]), "no 'file_name' and 'id'"),
    'a name twice': (labels('a.png', 'a.png'), 'stands twice'),
    'unknown id': (bent(labels('a.png', 'b.png'), image_id=77), 'is of image 77'),
    'boxes only': (bent(labels('a.png', 'b.png'), segmentation=[]), 'no polygon and no RLE'),
    'two points': (bent(labels('a.png', 'b.png'), segmentation=[[1, 2, 3, 4]]), 'at least three points'),
    'far away': (bent(labels('a.png', 'b.png'), segmentation=[[1, 2, 3, 4, 1e12, 6]]), 'near the picture'),
    'text as point': (bent(labels('a.png', 'b.png'), segmentation=[[1, 2, 3, 4, 'x', 6]]), 'cannot be drawn'),
    'RLE of another size': (bent(labels('a.png', 'b.png'), segmentation=dict(size=[9, 9], counts=[81])), 'its size'),
    'RLE too short': (bent(labels('a.png', 'b.png'), segmentation=dict(size=[24, 32], counts=[5])), 'do not fill'),
    'RLE no text': (bent(labels('a.png', 'b.png'), segmentation=dict(size=[24, 32], counts='~~~')), 'cannot be drawn'),
    'RLE of letters': (bent(labels('a.png', 'b.png'), segmentation=dict(size=[24, 32], counts='9:;')), 'do not fill'),
    'no list': (labels('a.png', 'b.png') | dict(annotations=[1]), "no list 'annotations'"),
}


@pytest.mark.parametrize('what', WRONG)
def test_what_does_not_fit_coco_is_one_sentence(tmp_path, what):
    for n in 'ab':
        save(tmp_path / f'{n}.png')
    content, words = WRONG[what]
    write(tmp_path / 'instances.json', content)
    one_sentence(lambda: open_dataset(tmp_path, None, progress=False).check(progress=False), 'instances.json', words)
    assert len(open_dataset(tmp_path, None, progress=False, masks=False).check(progress=False)) == 2


def test_missing_pictures_are_skipped_if_asked(tmp_path):
    for n in 'ab':
        save(tmp_path / f'{n}.png')
    write(tmp_path / 'instances.json', labels('b.png', 'c.png'))
    data = open_dataset(tmp_path, None, skip_broken=True, progress=False)
    assert data.scenes == ['b'] and len(data.skipped) == 2


def test_pictures_of_another_size_and_of_another_split(tmp_path):
    save(tmp_path / 'train2017/a.png', RGB[:, 1:])
    save(tmp_path / 'val2017/b.png')
    write(tmp_path / 'annotations/instances_train2017.json', labels('a.png'))
    write(tmp_path / 'annotations/instances_val2017.json', labels('a.png'))
    one_sentence(lambda: open_dataset(tmp_path, 'train', progress=False)[0], 'is 31x24 pixels', '32x24')
    one_sentence(lambda: open_dataset(tmp_path, 'val', progress=False), 'lists a.png, which is not in', 'copy them')


def test_other_json_is_not_taken_for_annotations(tmp_path):
    for name in ('captions_train.json', 'person_keypoints_train.json', 'settings.json', 'list.json'):
        write(tmp_path / name, labels('x.png') if '_' in name else dict(a=1) if name[0] == 's' else [1])
    save(tmp_path / 'a.png')
    assert open_dataset(tmp_path, None, progress=False).kind == 'image folder'


def test_what_segment_writes_is_read(tmp_path):
    save(tmp_path / 'a.png')
    write(tmp_path / 'instances.json', coco([Labeled('a.png', SEG)], 'rle'))
    (s,) = open_dataset(tmp_path, None, progress=False)
    assert (s.segmentation == SEG).all()


def panoptic(tmp_path, folder, **change):
    "A wall, two things, and pixels of no segment."
    numbers = np.choose(SEG, [1000, 5, 70000])
    numbers[:2] = 0
    save(tmp_path / folder, np.stack([numbers % 256, numbers // 256 % 256, numbers // 65536], -1))
    segments = [dict(id=1000, category_id=2), dict(id=5, category_id=1), dict(id=70000, category_id=1)]
    return (
        dict(
            images=[dict(id=3, file_name='a.jpg', height=24, width=32)],
            annotations=[dict(image_id=3, file_name='a.png', segments_info=segments)],
            categories=[dict(id=1, name='thing', isthing=1), dict(id=2, name='wall', isthing=0)],
        )
        | change
    )


@pytest.mark.parametrize('folder', ['annotations/panoptic_train2017/a.png', 'panoptic_train2017/a.png'])
def test_panoptic(tmp_path, folder):
    save(tmp_path / 'train2017/a.jpg')
    write(tmp_path / 'annotations/panoptic_train2017.json', panoptic(tmp_path, folder))
    (s,) = open_dataset(tmp_path, 'train', progress=False)
    want = SEG.copy()
    want[:2] = -1
    assert (s.segmentation == want).all() and [i['mask_id'] for i in s.instances] == [5, 70000]
    assert len(open_dataset(tmp_path, None, progress=False, masks=False)) == 1  # its PNGs are no photographs
    write(tmp_path / 'annotations/instances_train2017.json', labels('a.jpg'))
    both = open_dataset(tmp_path, 'train', progress=False)
    assert (both[0].segmentation == SEG).all() and both.unread == {'panoptic_train2017.json': 1}


def test_panoptic_without_kinds_or_file(tmp_path):
    save(tmp_path / 'train2017/a.jpg')
    file = tmp_path / 'annotations/panoptic_train2017.json'
    write(file, panoptic(tmp_path, 'annotations/panoptic_train2017/a.png', categories=[dict(id=1, name='x')]))
    one_sentence(lambda: open_dataset(tmp_path, 'train', progress=False)[0], "no 'isthing'")
    write(file, panoptic(tmp_path, 'annotations/panoptic_train2017/a.png'))
    (tmp_path / 'annotations/panoptic_train2017/a.png').unlink()
    one_sentence(lambda: open_dataset(tmp_path, 'train', progress=False)[0], 'a.png is missing')


# ---- Cityscapes and ADE20K

STREET = np.choose(SEG, [7, 26000, 26001])
STREET[:2], STREET[-1] = 24, 3  # a group of people; out of the region
STREET_SEG = SEG.copy()
STREET_SEG[:2], STREET_SEG[-1] = -1, -1


def difference(a, b):
    return np.abs(a.astype(int) - b).mean()


CITIES = {
    'two folders': ('leftImg8bit/train/ulm/ulm_0_leftImg8bit.png', 'gtFine/train/ulm/ulm_0_gtFine_instanceIds.png'),
    'one folder': ('train/ulm_0_leftImg8bit.png', 'train/ulm_0_gtFine_instanceIds.png'),
    'coarse': ('leftImg8bit/train/a/x_leftImg8bit.jpg', 'gtCoarse/train/a/x_gtCoarse_instanceIds.png'),
    'lower case': ('images/train/x_leftImg8bit.jpg', 'gt/train/x_gtFine_instanceids.png'),
    'no suffix of the image': ('images/train/x.jpg', 'labels/train/x_gtFine_instanceIds.png'),
    'TIFF': ('images/train/x.tif', 'labels/train/x_gtFine_instanceIds.tif'),
}


@pytest.mark.parametrize('layout', CITIES)
def test_layouts_of_cityscapes(tmp_path, layout):
    photo, mask = CITIES[layout]
    save(tmp_path / photo)
    save(tmp_path / mask, STREET, np.uint16)
    save(tmp_path / mask.replace('instanceIds', 'labelIds').replace('instanceids', 'labelIds'), SEG)
    save(tmp_path / photo.replace('train', 'val'), RGB[::-1])
    save(tmp_path / mask.replace('train', 'val'), STREET, np.uint16)
    (s,) = data = open_part(tmp_path, 'train', progress=False)
    assert (
        (s.segmentation == STREET_SEG).all()
        and difference(s.image, RGB) < difference(s.image, RGB[::-1])
        and sum(data.unread.values()) == 1
    )
    assert len(open_part(tmp_path, 'test', progress=False)) == 1 and len(open_dataset(tmp_path, None)) == 2
    assert len(open_dataset(tmp_path, None, masks=False)) == 2


def test_cityscapes_with_other_numbers_classes_only_or_no_mask(tmp_path):
    save(tmp_path / 'a/x_leftImg8bit.png')
    save(tmp_path / 'a/x_gtFine_labelIds.png', SEG)
    one_sentence(lambda: open_dataset(tmp_path, None), 'holds classes, not objects')
    save(tmp_path / 'a/x_gtFine_instanceIds.png', SEG)  # 1, 2 of one's own
    one_sentence(lambda: open_dataset(tmp_path, None)[0], 'hold no object', '1000 and more')
    save(tmp_path / 'a/y_leftImg8bit.png')
    save(tmp_path / 'a/y_gtFine_instanceIds.png', STREET, np.uint16)
    x, y = open_dataset(tmp_path, None)
    assert x.segmentation.max() == -1 and not x.instances and len(y.instances) == 2
    save(tmp_path / 'a/z_leftImg8bit.png')
    one_sentence(lambda: open_dataset(tmp_path, None), 'z_leftImg8bit.png has no mask', '1 of 3')
    assert len(open_dataset(tmp_path, None, skip_broken=True, progress=False)) == 2
    save(tmp_path / 'a/z_gtFine_instanceIds.png', STREET[1:], np.uint16)
    one_sentence(lambda: open_dataset(tmp_path, None)[2], 'must have the same size')


def test_ade20k(tmp_path):
    rgb = np.zeros((24, 32, 3), int)
    rgb[:] = 20, 5, 1
    rgb[SEG > 0] = 30, 7, 0
    rgb[..., 2] += 2 * (SEG == 1) + 3 * (SEG == 2)
    rgb[:2] = 0
    for split, i in (('training', 1), ('validation', 2)):
        folder = tmp_path / f'images/ADE/{split}/home/kitchen'
        save(folder / f'ADE_{split[:5]}_{i}.jpg')
        save(folder / f'ADE_{split[:5]}_{i}_seg.png', rgb)
        save(folder / f'ADE_{split[:5]}_{i}_parts_1.png', rgb)
        save(folder / f'ADE_{split[:5]}_{i}/instance_000_ADE_{split[:5]}_{i}.png', SEG)
    want = SEG + 1
    want[:2] = -1
    for part in ('train', 'test'):
        (s,) = data = open_part(tmp_path, part, progress=False)
        assert (s.segmentation == want).all() and len(s.instances) == 3
    assert sum(data.unread.values()) == 4 and data.remarks


def test_ade20k_challenge(tmp_path):
    for split in ('training', 'validation'):
        save(tmp_path / f'images/{split}/ADE_{split}_1.jpg')
        save(tmp_path / f'annotations/{split}/ADE_{split}_1.png', SEG)
    one_sentence(lambda: open_part(tmp_path, 'train', progress=False), 'holds classes, not objects')
    objects = np.zeros((24, 32, 3), int)
    objects[SEG == 1], objects[SEG == 2] = (9, 1, 0), (9, 2, 0)  # two of one class
    for split in ('training', 'validation'):
        save(tmp_path / f'annotations_instance/{split}/ADE_{split}_1.png', objects)
    (s,) = data = open_part(tmp_path, 'test', progress=False)
    assert (s.segmentation == SEG).all() and s.name.startswith('images/validation') and data.unread


# ---- Multi-Object Datasets


def example(**features):
    Example, Feature = _messages()
    out = Example()
    for name, values in features.items():
        f = Feature()
        if isinstance(values, bytes):
            f.bytes_list.value.append(values)
        elif values.dtype == np.uint8:
            f.bytes_list.value.extend([bytes([v]) for v in values.ravel().tolist()])
        else:
            f.float_list.value.extend(values.ravel().tolist())
        out.features.feature[name] = f.SerializeToString()
    return out.SerializeToString()


def framed(*records):
    out = b''
    for data in records:
        head = struct.pack('<Q', len(data))
        out += head + struct.pack('<I', masked_crc(head)) + data + struct.pack('<I', masked_crc(data))
    return out


def entities(h, w, backgrounds, num, seed=0):
    "Masks of `num` entities, of which the last is empty, and the segmentation that they stand for."
    r = np.random.default_rng(seed)
    parts = np.arange(h)[:, None] * backgrounds // h + np.zeros((h, w), int)
    for k in range(backgrounds, num - 1):
        y, x = r.integers(0, h - 8), r.integers(0, w - 8)
        parts[y : y + 8, x : x + 8] = k
    masks = np.stack([255 * (parts == k).astype(np.uint8) for k in range(num)])
    present = [k for k in range(backgrounds, num) if (parts == k).any()]
    return masks, sum((parts == k) * (i + 1) for i, k in enumerate(present)), r.integers(0, 255, (h, w, 3), np.uint8)


def clevr(seed):
    masks, seg, image = entities(240, 320, 1, 11, seed)
    return example(image=image, mask=masks, pixel_coords=np.zeros(33), visibility=np.ones(11)), seg, image


def tetrominoes(seed):
    masks, seg, image = entities(35, 35, 1, 4, seed)
    return example(image=image, mask=masks, visibility=np.ones(4), shape=np.zeros(4)), seg, image


def room(seed, num=7):
    masks, seg, image = entities(64, 64, 4, num, seed)
    return example(image=image, mask=masks), seg, image


def sprites(seed):
    masks, seg, image = entities(64, 64, 1, 5, seed)
    factors = dict(orientation=np.zeros(5), scale=np.ones(5), visibility=np.ones(5))
    return example(image=image, mask=np.moveaxis(masks, 0, 2).copy(), **factors), seg, image


def binarized(seed):
    masks, seg, image = entities(64, 64, 1, 4, seed)
    factors = dict(orientation=np.zeros(4), scale=np.ones(4), visibility=np.ones(4))
    data = example(image=image[..., 0].copy(), mask=np.moveaxis(masks, 0, 2).copy(), **factors)
    return data, seg, np.repeat(image[..., :1], 3, -1)


def as_one_string(seed):
    masks, seg, image = entities(64, 64, 4, 10, seed)
    return example(image=image.tobytes(), mask=masks.tobytes()), seg, image


@pytest.mark.parametrize('make', [clevr, tetrominoes, room, sprites, binarized, as_one_string])
@pytest.mark.parametrize('pack', [gzip.compress, zlib.compress, bytes], ids=['gzip', 'zlib', 'plain'])
def test_records_of_multi_object_datasets(tmp_path, make, pack):
    made = [make(seed) for seed in range(1 if make is clevr else 3)]
    (tmp_path / 'x.tfrecords').write_bytes(pack(framed(*(m[0] for m in made))))
    for path in (tmp_path, tmp_path / 'x.tfrecords'):
        data = open_dataset(path, None, progress=False)
        for s, (_, seg, image) in zip(data, made, strict=True):
            assert (s.image == image).all() and (s.segmentation == seg).all() and len(s.instances) == seg.max()
    assert all(s.segmentation is None for s in open_dataset(tmp_path, None, progress=False, masks=False))


def test_splits_of_records(tmp_path):
    for name in ('train', 'test_six_objects', 'test_empty_room'):
        num = 4 if 'empty' in name else 7
        (tmp_path / f'objects_room_{name}.tfrecords').write_bytes(
            gzip.compress(framed(*(room(i, num)[0] for i in (0, 1))))
        )
    assert not has_no_splits(tmp_path) and len(open_part(tmp_path, 'train', progress=False)) == 2
    one_sentence(lambda: open_part(tmp_path, 'test', progress=False), "no split 'test'; it holds test_empty_room")
    six = open_dataset(tmp_path, 'test_six_objects', progress=False)
    empty = open_dataset(tmp_path, 'test_empty_room', progress=False)
    assert len(six) == 2 and not any(s.segmentation.any() for s in empty)
    (tmp_path / 'tetrominoes_train.tfrecords').touch()
    one_sentence(lambda: open_part(tmp_path, 'train', progress=False), 'several data sets')


def test_one_file_of_records_holds_out_a_fifth(tmp_path):
    file = tmp_path / 'tetrominoes_train.tfrecords'
    file.write_bytes(gzip.compress(framed(*(tetrominoes(i)[0] for i in range(10)))))
    for path in (tmp_path, file):
        assert has_no_splits(path)
        train, test = (open_part(path, part, progress=False) for part in ('train', 'test'))
        assert len(train) + len(test) == 10 and not {*train.scenes} & {*test.scenes} and len(test)


def test_any_order_and_processes_give_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr('slotnb.formats.multi_object._STEP', 5000)
    monkeypatch.setattr('slotnb.formats.multi_object._CHUNK', 300)
    whole = RNG.integers(0, 99, 60_000, np.uint8).tobytes()
    (tmp_path / 'x').write_bytes(gzip.compress(whole[:20_000]) + gzip.compress(whole[20_000:]))
    file = Inflated(tmp_path / 'x')
    for i, start in enumerate(RNG.integers(0, 60_000, 40).tolist()):
        file = pickle.loads(pickle.dumps(file)) if i == 20 else file
        assert file.read(start, 900) == whole[start : start + 900]
    assert len(file._states) > 5


def test_damaged_records_are_one_sentence(tmp_path):
    records = [room(i)[0] for i in range(4)]
    whole = gzip.compress(framed(*records))
    file = tmp_path / 'x.tfrecords'

    def opened(data, **options):
        file.write_bytes(data)
        return MultiObjectRecords(file, progress=False, **options)

    for cut in (0, 1, 20, len(whole) // 2, len(whole) - 1, len(whole) - 9):
        one_sentence(lambda: opened(whole[:cut]), 'copy it again')
    bad = bytearray(framed(*records))
    bad[100] ^= 1
    one_sentence(lambda: opened(bytes(bad))[0], 'fails its checksum')
    rest = opened(gzip.compress(bytes(bad)), skip_broken=True)
    assert len(rest) == 3 and 'checksum' in rest.skipped[0]
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 255
    one_sentence(lambda: opened(bytes(flipped)).check(progress=False))
    one_sentence(lambda: opened(gzip.compress(framed(example(a=np.ones(3)))))[0], "'image' and 'mask'")
    one_sentence(lambda: opened(gzip.compress(framed(b'\xff' * 40)))[0], 'not a tf.train.Example')
    small = example(image=np.zeros((8, 8, 3), np.uint8), mask=np.zeros((7, 8, 8), np.uint8))
    one_sentence(lambda: opened(gzip.compress(framed(small)))[0], 'other sizes than Objects Room')
    video = example(image=b'', mask=b'', camera_matrix=np.zeros(16))
    one_sentence(lambda: opened(zlib.compress(framed(video)))[0], 'CATER')
    huge = struct.pack('<Q', 2**40)
    one_sentence(
        lambda: opened(gzip.compress(huge + struct.pack('<I', masked_crc(huge)))), 'no TFRecord file, or damaged'
    )
