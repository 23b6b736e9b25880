"`slotnb segment` and what it writes: on data of every kind, resumed, and refused where masks would be wrong."

import json
import os
import signal
import subprocess
import sys
import time
import av
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from safetensors.torch import load_file
from conftest import DATA, copy_scenes
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders, read_segmentation
from slotnb.evaluate import evaluate, load_run
from slotnb.formats.convert import convert_data
from slotnb.refine import refine_masks
from slotnb.runs.config import TrainConfig
from slotnb.runs.owner import Owner
from slotnb.train import fit

SCENES = KubricFolders(DATA, 'test')


def ask(capsys, *args):
    code = main(['segment', *map(str, args)])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    "Five pictures in folders, of four sizes and three formats, one in grey, one stored on its side."
    root = tmp_path_factory.mktemp('data') / 'bilder ü'
    sizes = {'a/1.jpg': (300, 200), 'a/b/c d.png': (64, 64), '2.webp': (200, 300), '$x_1$.png': (301, 199)}
    for i, (name, size) in enumerate(sizes.items()):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        im = Image.fromarray(SCENES[i].image).resize(size, Image.Resampling.BICUBIC)
        im.convert('L' if i == 3 else 'RGB').save(root / name)
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(SCENES[5].image).crop((0, 0, 256, 128)).save(root / 'turned.jpg', exif=exif)
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A short run with `feature_std`, which is applied to new images only if somebody remembers it."
    folder = tmp_path_factory.mktemp('run')
    data_dir = str(copy_scenes(folder / 'data', train=12, test=2))
    config = dict(data_dir=data_dir, save_dir=str(folder), num_epochs=4, warmup_epochs=1, rounds=1, normalizer='none')
    return load_run(fit(TrainConfig(**config, feature_std=2.0, device='cpu', slot_init='random'), show_progress=False))


def test_files(tmp_path, photos, capsys):
    code, out, _ = ask(capsys, photos, '--out', tmp_path, '--soft', '--coco', 'rle')
    assert code == 0 and '5 images' in out
    names = {'a/1': (200, 300), 'a/b/c d': (64, 64), '2': (300, 200), '$x_1$': (199, 301), 'turned': (256, 128)}
    rows = pd.read_csv(tmp_path / 'index.csv').set_index('stem')
    assert set(rows.index) == set(names)
    for name, size in names.items():
        labels = read_segmentation(tmp_path / f'labels/{name}.png')
        assert labels.shape == size and labels.max() == rows.segments[name] > 0 and labels.min() == 0
        assert Image.open(tmp_path / f'overlays/{name}.jpg').size == size[::-1]
        soft = load_file(tmp_path / f'soft/{name}.safetensors')
        assert soft['masks'].shape == (11, 32, 32) and soft['slots'].shape == (11, 64)
        torch.testing.assert_close(soft['masks'].float().sum(0), torch.ones(32, 32), rtol=0, atol=5e-3)
    coco = COCO(tmp_path / 'coco.json')
    for image in coco.imgs.values():
        assert (photos / image['file_name']).is_file()
        labels = read_segmentation(tmp_path / f"labels/{image['file_name'].rpartition('.')[0]}.png")
        for a in coco.imgToAnns[image['id']]:
            assert (coco.annToMask(a).astype(bool) == (labels == a['label'])).all()
    assert Image.open(tmp_path / 'contact_sheet.png').size[0] > 500


def test_labels_are_those_that_are_scored(tmp_path):
    "On the test scenes `segment` gives the refined masks of `evaluate`, scores and all."
    data_dir = str(copy_scenes(tmp_path / 'data', train=16, test=6))
    config = TrainConfig(data_dir=data_dir, save_dir=str(tmp_path), num_epochs=3, rounds=1, device='cpu')
    run_dir = fit(config, show_progress=False)
    result = evaluate(run_dir, show_progress=False)
    masks = load_file(run_dir / 'test_masks.safetensors')['merged'].float()
    scenes = KubricFolders(data_dir, 'test')
    found = [r.labels for r in load_run(run_dir).segment(scenes)]
    for labels, scene, m in zip(found, scenes, masks):
        same = labels == refine_masks(scene.image, m, grid=(32, 32))
        assert same.mean() > 0.995, scene.name  # the masks of a run are kept in half precision
    assert result['mbo_refined'] > 0.3 and len(found) == len(masks) == 6


def test_what_the_run_did_to_its_features_is_applied(run):
    "The masks of the run's own test features, which `evaluate` reads through `prepare`."
    assert run.scale != 1
    scene = SCENES[0]
    feats = run.segmenter().backbone(torch.tensor(scene.image).permute(2, 0, 1)[None]).half().float()
    want = run.predict(feats * run.scale).attn[0]
    result = run.segment(scene.image)
    top = want.argmax(0) == result.masks.flatten(1).argmax(0)
    forgotten = run.predict(feats).attn[0].argmax(0) == result.masks.flatten(1).argmax(0)
    used = want.argmax(0).unique()
    merged = len(result.masks.flatten(1).argmax(0).unique()) < len(used)
    assert merged or top.float().mean() > 0.99 > forgotten.float().mean()


def test_video_and_shards(tmp_path, capsys):
    frames = [SCENES[i].image[:128, :192] for i in (0, 1, 2)]
    with av.open(str(tmp_path / 'clip.mp4'), 'w') as container:
        stream = container.add_stream('libx264', rate=10)
        stream.height, stream.width, stream.pix_fmt = 128, 192, 'yuv420p'
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format='rgb24')))
        container.mux(stream.encode())
    assert ask(capsys, tmp_path / 'clip.mp4', '--out', tmp_path / 'v')[0] == 0
    assert sorted(p.name for p in (tmp_path / 'v/labels/clip').iterdir()) == ['00000.png', '00001.png', '00002.png']
    few = copy_scenes(tmp_path / 'few', test=4)
    convert_data(few, tmp_path / 'shards', 'webdataset', 'test', progress=False)
    shard = next((tmp_path / 'shards').rglob('*.tar'))
    code, out, err = ask(capsys, shard, '--out', tmp_path / 's', '--run', 'spectral', '--num_slots', 3, '--no_refine')
    assert code == 0 and '4 images' in out, err
    for scene in KubricFolders(few, 'test'):
        labels = read_segmentation(tmp_path / f's/labels/{scene.name}.png')
        assert labels.shape == (256, 256) and len(np.unique(labels)) == 3


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for p in folder.rglob('*')
        if p.is_file() and '.owner' not in p.name
    }


@pytest.mark.long
def test_killed_and_run_again(tmp_path, photos, capsys):
    "The same files as without a kill, to the last byte, and nothing else."
    whole, killed = tmp_path / 'whole', tmp_path / 'killed'
    assert ask(capsys, photos, '--out', whole, '--coco', 'polygons')[0] == 0
    code = 'import sys; from slotnb.cli import main; sys.exit(main(sys.argv[1:]))'
    command = [sys.executable, '-c', code, 'segment', str(photos), '--out', str(killed), '--coco', 'polygons']
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.glob('labels/**/*.png'))) < 2:
        time.sleep(0.05)
    assert process.poll() is None, 'it ended before it could be killed'
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / 'contact_sheet.png').exists()
    (killed / 'labels/.2.png.0123ab-99-abcdefgh').write_bytes(b'as a process leaves it that is killed')
    (killed / '.pre-commit-config.yaml').write_text('somebody else wrote this')
    subprocess.run(command, check=True, capture_output=True)
    (killed / '.pre-commit-config.yaml').unlink()
    assert contents(killed) == contents(whole)


def test_one_owner(tmp_path, photos, capsys):
    with Owner(tmp_path):
        code, _, err = ask(capsys, photos, '--out', tmp_path)
    assert code == 2 and f'in use by process {os.getpid()}' in err
    assert ask(capsys, photos / '2.webp', '--out', tmp_path)[0] == 0


def test_changed_and_other_settings(tmp_path, photos, capsys):
    one, out = tmp_path / 'one.png', tmp_path / 'out'
    Image.fromarray(SCENES[7].image).save(one)
    assert ask(capsys, one, '--out', out)[0] == 0
    first = read_segmentation(out / 'labels/one.png')
    Image.fromarray(SCENES[8].image).save(one)
    assert ask(capsys, one, '--out', out)[0] == 0
    assert (read_segmentation(out / 'labels/one.png') != first).mean() > 0.1
    for other in (('--num_slots', 7), ('--no_refine',), ('--min_pixels', 9), ('--run', 'spectral'), ('--soft',)):
        code, _, err = ask(capsys, one, '--out', out, *other)
        assert code == 2 and 'masks of other settings' in err and err.count('\n') == 1
    (out / 'segment.json').write_text('null')
    code, _, err = ask(capsys, one, '--out', out)
    assert code == 2 and 'segment.json' in err


def test_broken_pictures(tmp_path, photos, capsys):
    root = tmp_path / 'in'
    root.mkdir()
    Image.fromarray(SCENES[0].image).save(root / 'good.png')
    (root / 'bad.png').write_bytes((root / 'good.png').read_bytes()[:500])
    code, _, err = ask(capsys, root, '--out', tmp_path / 'out')
    assert code == 2 and 'bad.png' in err
    code, out, err = ask(capsys, root, '--out', tmp_path / 'out', '--skip_broken')
    assert code == 0 and '1 images' in out and '1 broken images left out' in err + out


@pytest.mark.parametrize(
    'args,why',
    [
        (('--device', 'cuda:99'), 'CUDA'),
        (('--min_pixels', -1), 'min_pixels'),
        (('--work_size', 3), 'work_size'),
        (('--num_slots', 1), 'at least 2'),
        (('--run', 'nowhere'), 'shipped models: movi_a'),
        (('--weights', 'random'), 'other features'),
        (('--max_frames', -1), 'max_frames'),
    ],
)
def test_refused(tmp_path, photos, capsys, args, why):
    code, _, err = ask(capsys, photos, '--out', tmp_path / 'out', *args)
    assert code == 2 and why in err and err.count('\n') == 1, err
    assert not (tmp_path / 'out/labels').exists()


def test_a_scene_folder_needs_its_split(tmp_path, capsys):
    few, out_dir = copy_scenes(tmp_path / 'few', train=1, test=2), tmp_path / 'masks'
    code, _, err = ask(capsys, few, '--out', out_dir)
    assert code == 2 and 'test, train' in err
    code, out, _ = ask(capsys, few, '--split', 'test', '--out', out_dir, '--no_refine')
    assert code == 0 and '2 images' in out


def test_a_missing_picture_is_not_called_data():
    with pytest.raises(SlotnbError, match="^images 'nowhere.jpg' does not exist"):
        load_run('movi_a').segment('nowhere.jpg')
