"""Memory of training and evaluation does not grow with the number of scenes, and large pictures are read, segmented and
drawn in parts."""

import os
import subprocess
import sys
import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / 'benchmarks'))
import scale

TINY = dict(slot_dim=16, hidden_dim=16, num_slots=3, num_iters=1, batch_size=30, num_epochs=1)


def test_memory_is_flat_in_scenes():
    """290 scenes more are 114 MB of features: neither training nor evaluating takes a quarter of that when nothing is
    kept; a run that keeps them is seen to."""
    r = scale.scale_scenes((60, 350), TINY, in_memory=0, threads=1)
    kept = scale.scale_scenes((60, 350), TINY, in_memory=10**9, threads=1)

    def growth(r, key='train_mb'):
        return r[key][1] - r[key][0]

    more = growth(r, 'features_mb')
    assert growth(r) < more / 4 and growth(r, 'evaluate_mb') < more / 4 and growth(kept) > more / 2, (r, kept)


def peak_mb(*args):
    "Peak memory of a command, in MB."
    process = subprocess.Popen([sys.executable, '-m', 'slotnb', *map(str, args)], stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, args
    return usage.ru_maxrss * 1024 / 1e6


def small_and_large(folder, suffix, **options):
    """One scene, and the same enlarged to 169 megapixels, a little below Pillow's limit: 507 MB as numbers and 676 MB
    inside Pillow. With floats of all pixels it would be more than 2 GB above what a small picture needs."""
    scene, side = Image.open(DATA / 'test/scene_0000/rgba_00000.png').convert('RGB'), 13_000
    for name, im in dict(small=scene, large=scene.resize((side, side))).items():
        (folder / name).mkdir()
        im.save(folder / name / f'scene.{suffix}', **options)
        yield folder / name


@pytest.mark.parametrize('suffix, options', [('png', dict(compress_level=1)), ('jpg', {})])
def test_memory_of_a_large_picture(tmp_path, suffix, options):
    "Labels and COCO masks have the full size, overlays at most 4096 pixels a side."
    info, segment = [], []
    for folder in small_and_large(tmp_path, suffix, **options):
        info.append(peak_mb('data', 'info', folder, '--out', f'{folder}.png'))
        segment.append(peak_mb('segment', folder, '--out', f'{folder}-masks', '--coco', 'rle'))
    assert info[1] - info[0] < 1300 and segment[1] - segment[0] < 1400, (info, segment)
    with Image.open(tmp_path / 'large-masks/labels/scene.png') as labels:
        assert labels.size == (13_000, 13_000)
        found = np.asarray(labels)[25::51, 25::51]
    other = np.asarray(Image.open(tmp_path / 'small-masks/labels/scene.png').resize(found.shape[::-1], 0))
    assert ((found > 0) == (other > 0)).mean() > 0.97  # the same objects
    with Image.open(tmp_path / 'large-masks/overlays/scene.jpg') as overlay:
        assert max(overlay.size) <= 4096
