"The study of motion on constructed clips: what the median of a clip misses, and objects that touch."

import sys
import numpy as np
import pytest
from conftest import ROOT
from slotnb.metrics import evaluate_scene

pytest.importorskip('skimage')


@pytest.fixture(scope='module')
def motion():
    sys.path.insert(0, str(ROOT / 'reports/video'))
    import motion

    yield motion
    sys.path.remove(str(ROOT / 'reports/video'))


def clip(rest):
    "A disc that moves until it touches one at rest; both are red and the floor is a ramp of grey."
    y, x = np.mgrid[:64, :64]
    images, labels = [], []
    for t in range(12):
        seg = np.zeros((64, 64), int)
        seg[(y - 32) ** 2 + (x - 14 - 2 * min(t, 8)) ** 2 <= 64] = 1
        seg[((y - 32) ** 2 + (x - 44) ** 2 <= 64) & rest] = 2
        image = np.full((64, 64, 3), 120, np.uint8) + (x // 8)[..., None].astype(np.uint8)
        image[seg == 1], image[seg == 2] = (200, 40, 40), (190, 50, 45)
        images.append(image)
        labels.append(seg)
    return np.stack(images), np.stack(labels)


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_an_object_at_rest_is_in_the_median_and_not_in_the_ground(motion):
    images, true = clip(rest=True)
    median, found, _ = motion.from_motion(images, np.random.default_rng(0))
    rests = true[-1] == 2
    assert median[-1][rests].mean() < 0.1 and found[-1][rests].mean() > 0.9
    assert iou(found[-1], true[-1] > 0) > 0.75


def test_discs_that_touch_are_parted_as_where_they_were_apart(motion):
    images, true = clip(rest=True)
    _, found, tracks = motion.from_motion(images, np.random.default_rng(0))
    regions = [motion.label(m)[0] for m in found]
    assert evaluate_scene(true[-1], regions[-1])['fg_ari'] < 0.5  # they are one region
    assert all(evaluate_scene(t, x)['fg_ari'] > 0.9 for t, x in zip(true, tracks))
    assert len(np.unique(tracks)) == 3  # the same two labels in all frames


def test_what_is_changed_in_the_masks_of_slots(motion):
    labels = np.zeros((64, 64), int)
    labels[10:30, 10:30] = 1
    tracks = labels.copy()
    tracks[:, 20:] *= 2
    assert [*np.unique(motion.part(labels, tracks))] == [0, 1, 2]
    assert (motion.part(labels, labels) == labels).all()
    lost = np.zeros((64, 64), bool)
    lost[40:60, 40:60] = True
    lost[0, :] = True  # too thin
    added = motion.add_lost(labels, lost)
    assert [*np.unique(added)] == [0, 1, 2] and (added[0] == 0).all() and (added[labels == 1] == 1).all()
