"Opening whatever a path is, saying what is in it, writing it in another format; and training on data without truth."

import json
import shutil
import sys
import types
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import DATA
from slotnb.core import SlotnbError
from slotnb.data import Dataset, KubricFolders, Sample
from slotnb.formats.convert import convert, convert_data, describe, info, info_text
from slotnb.formats.detect import open_dataset
from slotnb.report import build_report, load_runs, plot_masks, plot_objects
from slotnb.formats.shards import write_shards
from slotnb.sweep import score_floors
from slotnb.runs.config import preset
from slotnb.runs.verify import read_sealed
from slotnb.evaluate import evaluate
from slotnb.train import fit
from test_data import SEG, write

RGB = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)


def photo(path, **kw):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RGB).save(path, **kw)
    return path


def kubric(root, split='train', scenes=3, frames=1):
    for i in range(scenes):
        write(root / split / f'scene_{i:04}', frames=frames)
    return root


def refused(call, *words):
    with pytest.raises(SlotnbError) as e:
        call()
    assert '\n' not in str(e.value), e.value
    for w in words:
        assert w in str(e.value), e.value


def test_kinds(tmp_path):
    k = kubric(tmp_path / 'k', frames=3)
    write_shards(KubricFolders(k), tmp_path / 's', progress=False)
    photo(tmp_path / 'p/train/a b.JPG')
    photo(tmp_path / 'p/test/猫.png')
    for path, split, kind, n in (
        (k, 'train', 'Kubric folders', 3),
        (k / 'train', 'train', 'Kubric folders', 3),
        (tmp_path / 's', 'train', 'WebDataset shards', 3),
        (tmp_path / 's/train-000000.tar', 'train', 'WebDataset shards', 3),
        (f'{tmp_path}/s/train-{{000000..000000}}.tar', 'train', 'WebDataset shards', 3),
        (tmp_path / 'p', 'test', 'image folder', 1),
        (tmp_path / 'p/train', 'train', 'image folder', 1),
    ):
        ds = open_dataset(str(path), split, progress=False)
        assert (ds.kind, len(ds)) == (kind, n)
    assert (
        open_dataset(tmp_path / 'p', 'test', progress=False).scenes == ['猫']
        and len(open_dataset(k, max_frames=0, progress=False)) == 9
    )


def test_videos(tmp_path):
    av = pytest.importorskip('av')
    (tmp_path / 'v').mkdir()
    with av.open(str(tmp_path / 'v/a.MP4'), 'w') as c:
        s = c.add_stream('libx264', rate=5)
        s.width, s.height, s.pix_fmt = 48, 32, 'yuv420p'
        for _ in range(4):
            c.mux(s.encode(av.VideoFrame.from_ndarray(RGB, format='rgb24')))
        c.mux(s.encode())
    for path in tmp_path / 'v', tmp_path / 'v/a.MP4':
        assert (
            open_dataset(path, max_frames=3, progress=False).kind == 'video'
            and len(open_dataset(path, max_frames=3, progress=False)) == 3
        )
    photo(tmp_path / 'v/b.png')
    refused(lambda: open_dataset(tmp_path / 'v'), '1 images and 1 videos')


def test_records_are_handed_on(tmp_path, monkeypatch):
    "The reader itself has tests of its own; here it is only asked with what."
    asked = []

    def records(*a, **k):
        asked.append((a, k))
        return types.SimpleNamespace(entries=[])

    monkeypatch.setitem(sys.modules, 'slotnb.formats.movi', types.SimpleNamespace(MoviRecords=records))
    (tmp_path / 'movi_a/256x256/1.0.0').mkdir(parents=True)
    (tmp_path / 'movi_a/256x256/1.0.0/dataset_info.json').write_text('{}')
    paths = ['gs://kubric-public/tfds/movi_a/256x256/1.0.0', tmp_path / 'movi_a/256x256/1.0.0', tmp_path / 'movi_a']
    for p in paths:
        open_dataset(p, 'validation', 2, True, False)
    assert asked == [((p, 'validation', 2), dict(skip_broken=True, progress=False, masks=True)) for p in paths]


def test_what_is_nothing(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a/readme.txt').touch()
    (tmp_path / 'a/.hidden.png').touch()
    (tmp_path / 'loop').symlink_to(tmp_path / 'loop')
    (tmp_path / 'empty').mkdir()
    refused(lambda: open_dataset(tmp_path / 'a'), 'readme.txt', 'rgba_', 'dataset_info.json', '.tar', '.mp4', '.jpg')
    refused(lambda: open_dataset(tmp_path / 'a/readme.txt'), 'no reader supports')
    refused(lambda: open_dataset(tmp_path / 'empty'), 'it holds nothing')
    for p in 'nowhere', 'loop', 'x.tar', 'x.mp4':
        refused(lambda: open_dataset(tmp_path / p, progress=False), p)
    refused(lambda: open_dataset(kubric(tmp_path / 'k'), 'test'), "no split 'test'; it holds train")


def test_describe_says_grey_turned_and_skipped(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 8
    photo(tmp_path / 'a.jpg', exif=exif)
    photo(tmp_path / 'b.png')
    (tmp_path / 'c.png').touch()
    Image.fromarray(RGB[..., 0]).save(tmp_path / 'd.png')
    Image.fromarray(RGB[:16]).quantize(9).save(tmp_path / 'e.png')
    refused(lambda: info(tmp_path, progress=False), 'c.png cannot be read (it is empty)')
    ds = open_dataset(tmp_path, skip_broken=True, progress=False)
    d = describe(ds, progress=False)
    assert (d['scenes'], d['frames'], d['grey'], d['rotated'], d['has_ground_truth'], len(d['skipped'])) == (
        4,
        4,
        1,
        1,
        False,
        1,
    )
    assert (
        d['sizes'] == {'48x32': 2, '32x48': 1, '48x16': 1}
        and d['objects'] == {}
        and len(d['notes']) == 5
        and json.dumps(d)
    )
    text = info_text(d)
    for words in (
        'image folder',
        'grey: 1 of 4',
        'stored rotated: 1 of 4',
        'without ground truth: 4 of 4',
        'skipped: 1',
        'c.png',
        '48x32 (2)',
    ):
        assert words in text


def test_describe_counts_what_can_be_seen(tmp_path):
    write(tmp_path / 'train/s')
    Image.fromarray(np.where(SEG == 2, 0, SEG).astype('uint8')).save(tmp_path / 'train/s/segmentation_00000.png')
    d = describe(open_dataset(tmp_path), progress=False)
    assert d['objects'] == {1: 1} and d['materials'] == {'metal': 1} and d['notes'] == []
    text = info(tmp_path, out=tmp_path / 'sheet.png', progress=False)
    assert 'sheet.png' in text and Image.open(tmp_path / 'sheet.png').format == 'PNG'
    photo(tmp_path / 'photos/a.png')
    info(tmp_path / 'photos', out=tmp_path / 'bare.png', progress=False)
    assert Image.open(tmp_path / 'bare.png').size[0] > 100


def same(a, b, labels=True):
    return (
        a[:2] == b[:2]
        and (a.image == b.image).all()
        and (a.segmentation == b.segmentation).all()
        and a.materials == b.materials
        and (not labels or a.instances == b.instances)
    )


@pytest.mark.parametrize('frames', [1, 3])
def test_round_trip(tmp_path, frames):
    k = kubric(tmp_path / 'k', 'test', frames=frames)
    first = open_dataset(k, 'test', 0)
    assert '3 scenes' in convert_data(k, tmp_path / 's', 'webdataset', 'test', shard_size=2, progress=False)
    convert_data(tmp_path / 's', tmp_path / 'k2', 'kubric', 'test', progress=False)
    for p, kind in ((tmp_path / 's', 'WebDataset shards'), (tmp_path / 'k2', 'Kubric folders')):
        again = open_dataset(p, 'test', 0, progress=False).check(progress=False)
        assert again.kind == kind
        assert all(same(a, b) for a, b in zip(first, again, strict=True))


def test_masks_of_photos_become_kubric_scenes(tmp_path):
    photo(tmp_path / 'p/sub dir/猫.png')
    (tmp_path / 'p/masks/sub dir').mkdir(parents=True)
    Image.fromarray(SEG * 100).save(tmp_path / 'p/masks/sub dir/猫.png')
    ds = open_dataset(tmp_path / 'p')
    convert(ds, tmp_path / 'k', 'kubric', progress=False)
    (s,) = KubricFolders(tmp_path / 'k').check(progress=False)
    assert s.name == 'sub dir_猫' and same(ds[0]._replace(name=s.name), s)


def test_shards_keep_more_than_65535_and_ids_above_255(tmp_path):
    photo(tmp_path / 'p/a.png')
    (tmp_path / 'p/masks').mkdir()
    wide = np.kron(200 + np.arange(8 * 12).reshape(8, 12), np.ones((4, 4))).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / 'p/masks/a.png')
    ds = open_dataset(tmp_path / 'p')
    for fmt in 'kubric', 'webdataset':
        convert(ds, tmp_path / fmt, fmt, progress=False)
        assert same(ds[0], open_dataset(tmp_path / fmt, progress=False)[0])

    class Huge(Dataset):
        def read(self, entry):
            return ds[0]._replace(segmentation=ds[0].segmentation + 70000)

    refused(
        lambda: convert(Huge('huge', ds.entries), tmp_path / 'huge', 'webdataset', progress=False), 'does not fit a PNG'
    )
    assert not list((tmp_path / 'huge').glob('*.tar'))


def test_what_changes_with_the_frame_is_no_property_of_the_scene(tmp_path):
    k = open_dataset(kubric(tmp_path / 'k', scenes=1, frames=2), max_frames=0)

    class Moving(Dataset):
        def read(self, e):
            s = k.read(e)
            return s._replace(instances=[i | dict(position=np.array([e.frame, 0.0])) for i in s.instances])

    ds = Moving('moving', k.entries)
    convert(ds, tmp_path / 'out', 'kubric', progress=False)
    assert all(same(a, b) for a, b in zip(k, open_dataset(tmp_path / 'out', max_frames=0)))
    convert(ds, tmp_path / 'shards', 'webdataset', progress=False)
    assert [s.instances[0]['position'] for s in open_dataset(tmp_path / 'shards', max_frames=0, progress=False)] == [
        [0, 0],
        [1, 0],
    ]


def test_conversion_goes_on_whole_or_absent(tmp_path):
    k = kubric(tmp_path / 'k', scenes=4, frames=2)
    png = k / 'train/scene_0002/rgba_00001.png'
    data = png.read_bytes()
    png.write_bytes(data[:200])
    go = lambda: convert_data(k, tmp_path / 'out', 'kubric', progress=False)
    refused(go, 'scene_0002', 'rgba_00001.png')
    assert sorted(p.name for p in (tmp_path / 'out/train').iterdir()) == ['scene_0000', 'scene_0001']
    kept = (tmp_path / 'out/train/scene_0000/metadata.json').stat().st_mtime_ns
    png.write_bytes(data)
    go()
    assert (
        len(open_dataset(tmp_path / 'out').check(progress=False)) == 4
        and (tmp_path / 'out/train/scene_0000/metadata.json').stat().st_mtime_ns == kept
    )
    png.write_bytes(data[:200])
    assert '1 broken ones skipped' in convert_data(k, tmp_path / 'rest', 'webdataset', skip_broken=True, progress=False)


def test_conversions_do_not_mix(tmp_path):
    k = kubric(tmp_path / 'k')
    convert_data(k, tmp_path / 'out', 'kubric', progress=False)
    refused(lambda: convert_data(k, k, 'kubric', progress=False), "holds a split 'train' already")
    refused(lambda: convert_data(k, tmp_path / 'out', 'webdataset', progress=False), 'another conversion')
    other = kubric(tmp_path / 'other')
    refused(lambda: convert_data(other, tmp_path / 'out', 'kubric', progress=False), 'another conversion')
    broken = kubric(tmp_path / 'broken')
    (broken / 'train/scene_0000/rgba_00000.png').write_bytes(b'')
    go = lambda **kw: convert_data(broken, tmp_path / 'again', progress=False, **kw)
    refused(go, 'rgba_00000.png')
    assert '1 broken ones skipped' in go(skip_broken=True)  # nothing was written, so nothing is in the way
    refused(lambda: go(skip_broken=True, shard_size=7), 'shard_size 1000 there, 7 here')
    refused(lambda: convert_data(k, tmp_path / 'x', 'coco', progress=False), "'coco'", 'kubric or webdataset')
    photo(tmp_path / 'p/a.png')
    refused(
        lambda: convert_data(tmp_path / 'p', tmp_path / 'x', 'kubric', progress=False),
        'has no ground truth',
        'webdataset',
    )
    assert not (tmp_path / 'x').exists() and len(open_dataset(tmp_path / 'out').check(progress=False)) == 3
    (tmp_path / 'file').touch()
    refused(lambda: convert_data(k, tmp_path / 'file/x', 'webdataset', progress=False), str(tmp_path / 'file'))


@pytest.fixture(scope='module')
def bare_run(tmp_path_factory):
    "A run on photographs: no masks anywhere."
    root = tmp_path_factory.mktemp('bare')
    for split in 'train', 'test':
        (root / 'photos' / split).mkdir(parents=True)
        for f in sorted((DATA / split).glob('*/rgba_00000.png')):
            (root / 'photos' / split / f'{f.parent.name}.png').symlink_to(f)  # the same pixels: features are cached
    config = preset(
        'version_0_1',
        data_dir=str(root / 'photos'),
        save_dir=str(root / 'runs/a'),
        num_epochs=1,
        warmup_epochs=0,
        slot_dim=32,
        hidden_dim=32,
        device='cpu',
    )
    return config, fit(config, False)


def test_training_and_evaluation_without_truth(bare_run, tmp_path):
    config, run_dir = bare_run
    result = evaluate(run_dir, False)
    assert {'test_mse', 'test_fvu', 'test_fvu_instance', 'slot_cosine', 'effective_slots', 'collapse'} <= set(result)
    assert (
        not [k for k in result if k.startswith(('ari', 'fg_ari', 'mbo', 'miou', 'best_overlap'))]
        and read_sealed(run_dir / 'result.json') == result
    )
    assert (
        list(pd.read_csv(run_dir / 'test_scenes.csv').columns) == ['scene', 'frame']
        and len(pd.read_csv(run_dir / 'test_scenes.csv')) == 24
    )
    scenes = list(open_dataset(config.data_dir, 'test'))
    assert (
        len(plot_masks(run_dir, scenes, [0, 2]).axes) == 2 * (2 + config.num_slots)
        and len(plot_objects(run_dir, scenes, [0, 1]).axes) == 6
    )
    assert len(load_runs(run_dir.parent.parent)) == 1
    page = build_report(run_dir.parent.parent, tmp_path / 'report.html').read_text()
    assert 'Runs without ground truth' in page and 'slots after merging' in page and 'one seed' in page
    assert (tmp_path / 'report/agreement.csv').is_file() and 'nan' not in (tmp_path / 'report/results.csv').read_text()
    floors = score_floors('dinov2_vits14', config, [0], False)
    assert floors.empty and 'method' in floors


def test_the_format_does_not_change_the_training(bare_run, tmp_path):
    "Photographs and shards of the same pixels: the same losses to the last digit."
    config, run_dir = bare_run
    for split in 'train', 'test':
        convert_data(config.data_dir, tmp_path / 's', 'webdataset', split, progress=False)
    from dataclasses import replace

    again = fit(replace(config, data_dir=str(tmp_path / 's'), save_dir=str(tmp_path / 'run')), False)
    assert (again / 'metrics.csv').read_text() == (run_dir / 'metrics.csv').read_text()
