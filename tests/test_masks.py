"Masks of every kind that people have: what the numbers mean, or one sentence why that is open."

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter
from slotnb.baselines import ground_truth_masks, kmeans_masks
from slotnb.core import SlotnbError
from slotnb.data import Sample
from slotnb.runs.scored import SCORE_SIZE, at_score_size
from slotnb.feature_measures import LabeledScenes, fit_embedding, mask_scores, patch_labels, reference_scores
from slotnb.formats.convert import convert, describe
from slotnb.formats.detect import open_dataset
from slotnb.formats.images import ImageFolder
from slotnb.formats.masks import VOID, number_instances, read_mask
from slotnb.metrics import evaluate_scene
from slotnb.normalizer import Normalizer
from slotnb.plots import colorize, match_colors
from tqdm import tqdm

SIZE = (64, 48)
GREY = Image.new('L', SIZE)
for i, (x, y) in enumerate([(4, 5), (30, 8), (16, 26)], 1):
    ImageDraw.Draw(GREY).ellipse([x, y, x + 18, y + 18], fill=i)
IDS = np.asarray(GREY)
EDGE = np.asarray(GREY.filter(ImageFilter.MaxFilter(3))) != np.asarray(GREY.filter(ImageFilter.MinFilter(3)))
OPAQUE = Image.new('L', SIZE, 255)
COLORS = np.array([[0, 0, 0], [220, 20, 60], [0, 130, 200], [220, 200, 30]], np.uint8)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [0, 0, 0] * 251 + [224, 224, 192]


def values(*table, dtype=np.uint8):
    "The three disks with other numbers, as an image."
    return Image.fromarray(np.array(table, dtype)[IDS])


def palette(colors, pixels=IDS):
    im = Image.fromarray(pixels.astype(np.uint8), 'P')
    im.putpalette(colors)
    return im


def number(im, path, **options):
    im.save(path, **options)
    return number_instances(read_mask(path))[0]


READ = {  # a mask, and options with which it is saved
    'grey': (GREY, {}),
    'grey of 16 bits': (values(0, 1000, 2000, 3000, dtype=np.uint16), {}),
    'grey and alpha': (Image.merge('LA', (GREY, OPAQUE)), {}),
    'equal channels': (Image.merge('RGB', (GREY, GREY, GREY)), {}),
    'equal channels and alpha': (Image.merge('RGBA', (GREY, GREY, GREY, OPAQUE)), {}),
    'palette': (palette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]), {}),
    'palette with a transparent ground': (palette([0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255]), dict(transparency=0)),
    'palette of random colors': (palette(np.random.default_rng(0).integers(1, 250, 768).tolist()), {}),
    'equal steps of grey': (values(0, 85, 170, 255), {}),
    'gaps': (values(0, 1, 7, 9), {}),
}


@pytest.mark.parametrize('kind', READ)
def test_kinds_of_masks_that_are_read(tmp_path, kind):
    im, options = READ[kind]
    assert (number(im, tmp_path / 'a.png', **options) == IDS).all()


@pytest.mark.parametrize('ground', ['black', 'transparent'])
def test_colors_are_objects(tmp_path, ground):
    alpha = 255 * (IDS > 0).astype(np.uint8)
    pixels = COLORS[IDS] if ground == 'black' else np.dstack([COLORS[IDS] + (IDS == 0)[..., None] * np.uint8(9), alpha])
    seg = number(Image.fromarray(pixels), tmp_path / 'a.png')
    assert (seg == np.array([0, 2, 1, 3])[IDS]).all()  # numbered by 65536 r + 256 g + b


VOIDS = {
    '255 beside 1, 2, 3': Image.fromarray(np.where(EDGE, 255, IDS).astype(np.uint8)),
    '65535 beside 1, 2, 3': Image.fromarray(np.where(EDGE, 65535, IDS.astype(np.uint16)).astype(np.uint16)),
    'palette of PASCAL VOC': palette(VOC, np.where(EDGE, 255, IDS)),
    'optimized palette of PASCAL VOC': palette(VOC[:12] + [224, 224, 192], np.where(EDGE, 4, IDS)),
    'palette of greys': palette([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 255, 255, 255], np.where(EDGE, 4, IDS)),
    'colors of PASCAL VOC': Image.fromarray(
        np.where(EDGE[..., None], np.uint8([224, 224, 192]), np.array(VOC[:12], np.uint8).reshape(4, 3)[IDS])
    ),
}


@pytest.mark.parametrize('kind', VOIDS)
def test_void_is_in_no_metric(tmp_path, kind):
    seg = number(VOIDS[kind], tmp_path / 'a.png')
    assert ((seg == VOID) == EDGE).all() and seg.max() == 3
    wild = np.where(EDGE, np.random.default_rng(0).integers(4, 9, EDGE.shape), IDS)  # wrong in void pixels only
    scores = evaluate_scene(seg, wild)
    assert scores == dict(ari=1.0, fg_ari=1.0, mbo=1.0, miou=1.0)
    shuffled = np.random.default_rng(1).integers(0, 4, EDGE.shape)
    known = evaluate_scene(seg[~EDGE][None], shuffled[~EDGE][None])
    assert evaluate_scene(seg, shuffled) == known


REFUSED = {  # a mask, options with which it is saved, words of the message
    '255 beside 100': (values(0, 100, 255, 255), {}, '255 may be void or an object'),
    'a trimap': (values(0, 128, 255, 255), {}, '255 may be void or an object'),
    'the ground is the second color': (palette([255, 0, 0, 0, 0, 0], IDS % 2), {}, 'the ground may be'),
    'white beside a first color': (palette([255, 0, 0, 255, 255, 255, 0, 0, 255], IDS % 3), {}, 'the ground may be'),
    'another color is transparent': (palette(VOC), dict(transparency=2), 'the ground may be'),
    'half-transparent': (Image.merge('LA', (GREY, GREY.point(lambda v: 255 - 60 * v))), {}, 'half-transparent'),
    'objects in the alpha channel': (
        Image.merge('RGBA', [Image.new('L', SIZE)] * 3 + [GREY.point(lambda v: 255 * (v > 0))]),
        {},
        'black and transparent',
    ),
    'resized bilinearly': (values(0, 85, 170, 255).resize((90, 70), Image.BILINEAR), {}, 'resize by nearest'),
    'drawn with soft edges': (
        values(0, 255, 255, 255).resize((320, 240)).resize(SIZE, Image.LANCZOS),
        {},
        'resize by nearest',
    ),
    'a smooth map': (Image.fromarray(np.tile(np.arange(64) * 3 + 1, (48, 1)).astype(np.uint8)), {}, 'numbers, as soft'),
    'fractions': (Image.fromarray((IDS / 3).astype(np.float32)), {}, 'holds fractions'),
}


@pytest.mark.parametrize('kind', REFUSED)
def test_what_is_open_is_refused(tmp_path, kind):
    im, options, words = REFUSED[kind]
    path = tmp_path / ('a.tiff' if im.mode == 'F' else 'a.png')
    with pytest.raises(SlotnbError, match=words) as e:
        number(im, path, **options)
    assert str(path) in str(e.value) and '; ' in str(e.value) and '\n' not in str(e.value)


def test_a_jpeg_is_no_mask(tmp_path):
    with pytest.raises(SlotnbError, match='a.jpg is a JPEG, which changes the numbers'):
        number(GREY, tmp_path / 'a.jpg')


def folder(root, *masks):
    "Images with these masks."
    (root / 'masks').mkdir(parents=True)
    for i, im in enumerate(masks):
        Image.effect_noise(im.size, 50).convert('RGB').save(root / f'{i}.png')
        im.save(root / f'masks/{i}.png')
    return root


def test_255_alone_goes_by_the_other_masks(tmp_path):
    alone, numbered, void = values(0, 255, 255, 255), values(0, 1, 2, 3), VOIDS['255 beside 1, 2, 3']
    objects = ImageFolder(folder(tmp_path / 'a', alone, alone))
    assert [s.segmentation.max() for s in objects] == [1, 1] and 'is an object, because no mask' in objects.remarks[0]
    data = ImageFolder(folder(tmp_path / 'b', alone, numbered, void))
    first, second, third = data
    assert (
        'is void, because it is void beside other numbers in the mask of 2' in data.remarks[0]
        and len(data.remarks) == 1
    )
    assert (first.segmentation == np.where(IDS > 0, VOID, 0)).all() and first.instances == []
    assert second.segmentation.max() == third.segmentation.max() == 3
    with pytest.raises(SlotnbError, match='may be void or an object'):
        ImageFolder(folder(tmp_path / 'c', alone, numbered))[0]


def test_void_is_counted_and_kept_in_shards(tmp_path):
    data = ImageFolder(folder(tmp_path / 'a', VOIDS['palette of PASCAL VOC'], GREY))
    (note,) = [n for n in describe(data, progress=False)['notes'] if n.startswith('void')]
    assert f'{50 * EDGE.mean():.1f} % of the pixels, in 1 of 2 masks' in note
    convert(data, tmp_path / 'shards', 'webdataset', progress=False)
    for a, b in zip(data, open_dataset(tmp_path / 'shards', progress=False), strict=True):
        assert (a.segmentation == b.segmentation).all() and a.instances == b.instances
    with pytest.raises(SlotnbError, match='void pixels, which Kubric has not'):
        convert(data, tmp_path / 'kubric', 'kubric', progress=False)


def test_void_in_pictures_and_on_the_grid():
    seg = np.where(EDGE, VOID, IDS.astype(np.int64))
    assert (colorize(seg)[EDGE] == 1).all() and (colorize(seg)[~EDGE] == colorize(IDS)[~EDGE]).all()
    assert match_colors(seg, IDS).tolist() == [0, 1, 2, 3]
    seg[:8, :8] = VOID  # a patch of void only
    assert np.allclose(ground_truth_masks(seg, (6, 8), soft=True).sum(0), 1)
    assert ground_truth_masks(seg, (6, 8)).shape == (4, 48) and patch_labels(seg, (6, 8)).max() == 3
    labels = patch_labels(seg, (6, 8))
    assert labels[0] == -1 and labels.min() == -1 and (patch_labels(np.full((48, 64), VOID), (6, 8)) == -1).all()


def test_large_images_are_scored_at_a_stated_size():
    "The image is averaged, the mask keeps its numbers and void; smaller images stay as they are."
    seg = np.kron(np.where(EDGE, VOID, IDS.astype(np.int64)), np.ones((16, 16), np.int64))
    large = Sample('a', 0, None, np.zeros((*seg.shape, 3), np.uint8), seg, [])
    small = at_score_size(large)
    assert small.image.shape == (384, SCORE_SIZE, 3) and small.segmentation.shape == (384, SCORE_SIZE)
    assert (small.segmentation == seg[::2, ::2]).all()
    assert at_score_size(small).segmentation is small.segmentation


def test_a_patch_of_void_is_in_no_measure_of_the_card():
    "Whatever its features are, and it is no background."
    rng = np.random.default_rng(0)
    seg = np.zeros((48, 64), np.int64)
    seg[8:24, 8:32], seg[24:40, 32:56], seg[:, 56:] = 1, 2, VOID
    scene = Sample('a', 0, None, rng.integers(0, 255, (48, 64, 3), np.uint8), seg, [dict(material='')] * 2)
    feats = torch.tensor(rng.normal(size=(4, 48, 6)) + 3 * np.eye(6)[patch_labels(seg, (6, 8))], dtype=torch.float32)
    wild = feats.clone()
    wild[:2, patch_labels(seg, (6, 8)) == -1] += 50  # of the scored scenes, in void patches only

    def measures(feats):
        data = LabeledScenes(feats[:2], [scene] * 2, [0, 1], feats[2:], [scene] * 2, [0, 1], (6, 8))
        embedding = fit_embedding(feats[2:], data.train_labels)
        made = [kmeans_masks(f, 3) for f in data.feats]
        scores = mask_scores(data, Normalizer('none', 6), 3, (0,), dict(kmeans=made), tqdm(disable=True))
        return scores, embedding, reference_scores(data)

    (a, embedding, reference), (b, _, _) = measures(feats), measures(wild)
    assert a['foreground_iou'] == b['foreground_iou'] and a['fvu_true_segments'] == b['fvu_true_segments']
    assert len(embedding[-1].classes_) == 2 * 3  # ground and two objects a scene
    assert reference.foreground_iou['fixed blocks'] == 12 / 42
