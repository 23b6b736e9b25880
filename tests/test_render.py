"The committed scenes are what the recipe makes: planned again without light, they equal what lies on the disk."
import sys
from collections import Counter
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from slotnb import render as r
from slotnb.core import SlotnbError, read_json

ROOT = Path(__file__).parent.parent/'data/movi_a_subset'
SCENES = sorted(ROOT.glob('*/scene_*'))

def plan(folder):
    flags = read_json(folder/'metadata.json')['flags']
    kinds = r.scene_kinds(20, 40) if flags['split'] == 'train' else r.scene_kinds(8, 16)
    index = int(folder.name.split('_')[1])
    return r.plan_scene(seed=0, split=folder.parent.name, index=index, kind=kinds[index])

@pytest.mark.parametrize('name', ['train/scene_0000', 'train/scene_0002', 'test/scene_0005'])
def test_recipe_makes_the_committed_scene(name):
    pytest.importorskip('mujoco')
    folder = ROOT/name
    scene = plan(folder)
    assert r.scene_metadata(scene) == read_json(folder/'metadata.json')
    assert r.scene_events(scene) == read_json(folder/'events.json')
    assert np.array_equal(np.array(Image.open(folder/'segmentation_00000.png')), scene.segmentation[0])

def test_a_changed_recipe_is_noticed(monkeypatch):
    pytest.importorskip('mujoco')
    monkeypatch.setitem(r.MATERIALS, 'metal', dict(r.MATERIALS['metal'], friction=0.41))
    folder = ROOT/'train/scene_0002'
    assert r.scene_metadata(plan(folder)) != read_json(folder/'metadata.json')

def test_counts_and_size():
    metas = [read_json(s/'metadata.json') for s in SCENES]
    assert Counter((m['flags']['split'], m['flags']['kind']) for m in metas) == {
        ('train', 'metal'): 20, ('train', 'mixed'): 40, ('test', 'metal'): 8, ('test', 'mixed'): 16}
    assert len({m['metadata']['seed'] for m in metas}) == len(metas)
    assert sum(p.stat().st_size for p in ROOT.rglob('*') if p.is_file()) <= 12e6

@pytest.mark.parametrize('folder', SCENES, ids=lambda p: f'{p.parent.name}-{p.name}')
def test_scene_is_sound(folder):
    assert sorted(p.name for p in folder.iterdir()) == [
        'data_ranges.json', 'events.json', 'metadata.json', 'rgba_00000.png', 'segmentation_00000.png']
    meta = read_json(folder/'metadata.json')
    image, labels = [np.array(Image.open(folder/f'{k}_00000.png')) for k in ('rgba', 'segmentation')]
    n, things = meta['metadata']['num_instances'], meta['instances']
    assert image.shape == (256, 256, 4) and labels.shape == (256, 256) and 3 <= n <= 10 and len(things) == n
    pixels = np.bincount(labels.ravel(), minlength=n+1)
    assert len(pixels) == n+1 and pixels[1:].min() >= 25 and pixels[1:].tolist() == [t['visibility'][0] for t in things]
    assert {t['material'] for t in things} == ({'metal'} if meta['flags']['kind'] == 'metal' else {'metal', 'rubber'})
    assert (image[..., :3] == 255).mean() < 1e-4

@pytest.mark.parametrize('missing', ['mujoco', 'mitsuba'])
def test_missing_library_is_named(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == 'mitsuba': pytest.importorskip('mujoco')
    with pytest.raises(SlotnbError, match=rf'{missing}.*slotnb\[render\]'): r.render(tmp_path, num_train_mixed=1)

def test_full_disk_leaves_nothing(monkeypatch, tmp_path):
    pytest.importorskip('mujoco')
    scene = r.plan_scene(size=32, min_pixels=1)
    def full(*a, **k): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(r.Image.Image, 'save', full)
    with pytest.raises(SlotnbError, match='scene_0000: No space left'):
        r.write_scene(tmp_path/'scene_0000', scene, [np.zeros((32, 32, 3), np.uint8)])
    assert not list(tmp_path.iterdir())
