"""The committed scenes are what the recipe makes, and a dataset is the same whoever makes it, however often it was
interrupted."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from multiprocessing import active_children
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
from conftest import DATA, ROOT
from slotnb.scenes import camera, physics as p, plan as plans, render as r
from slotnb.scenes.kubric_files import scene_events, scene_metadata, write_scene
from slotnb.scenes.lighting import light
from slotnb.core import SlotnbError, read_json

SCENES = sorted(DATA.glob('*/scene_*'))


def plan(folder):
    flags = read_json(folder / 'metadata.json')['flags']
    index = int(folder.name.split('_')[1])
    kinds = r.scene_kinds(*r.COMMITTED[flags['split']])
    return plans.plan_scene(seed=0, split=folder.parent.name, index=index, kind=kinds[index])


# --- the committed scenes


@pytest.mark.parametrize('name', ['train/scene_0000', 'train/scene_0002', 'test/scene_0005'])
def test_recipe_makes_the_committed_scene(name):
    pytest.importorskip('mujoco')
    folder = DATA / name
    scene = plan(folder)
    assert scene_metadata(scene) == read_json(folder / 'metadata.json')
    assert scene_events(scene) == read_json(folder / 'events.json')
    assert np.array_equal(np.array(Image.open(folder / 'segmentation_00000.png')), scene.segmentation[0])


def test_poses_do_not_depend_on_the_cpu():
    "BLAS adds in another order on another CPU; bouncing things make another scene of that."
    for x in np.random.default_rng(0).normal(size=(200, 4)):
        a, b, c, d = x.tolist()
        assert p.unit_vectors(x).tolist() == (x / np.sqrt(((a * a + b * b) + c * c) + d * d)).tolist()


def test_a_changed_recipe_is_noticed(monkeypatch):
    pytest.importorskip('mujoco')
    monkeypatch.setitem(p.MATERIALS, 'metal', dict(p.MATERIALS['metal'], friction=0.41))
    folder = DATA / 'train/scene_0002'
    assert scene_metadata(plan(folder)) != read_json(folder / 'metadata.json')


def test_counts_and_size():
    metas = [read_json(s / 'metadata.json') for s in SCENES]
    assert Counter((m['flags']['split'], m['flags']['kind']) for m in metas) == {
        ('train', 'metal'): 20,
        ('train', 'mixed'): 40,
        ('test', 'metal'): 8,
        ('test', 'mixed'): 16,
    }
    assert len({m['metadata']['seed'] for m in metas}) == len(metas)
    assert sum(f.stat().st_size for f in DATA.rglob('*') if f.is_file()) <= 12e6


@pytest.mark.parametrize('folder', SCENES, ids=lambda f: f'{f.parent.name}-{f.name}')
def test_scene_is_sound(folder):
    assert sorted(f.name for f in folder.iterdir()) == [
        'data_ranges.json',
        'events.json',
        'metadata.json',
        'rgba_00000.png',
        'segmentation_00000.png',
    ]
    meta = read_json(folder / 'metadata.json')
    image, labels = [np.array(Image.open(folder / f'{k}_00000.png')) for k in ('rgba', 'segmentation')]
    n, things = meta['metadata']['num_instances'], meta['instances']
    assert image.shape == (256, 256, 4) and labels.shape == (256, 256) and 3 <= n <= 10 and len(things) == n
    pixels = np.bincount(labels.ravel(), minlength=n + 1)
    assert (
        len(pixels) == n + 1 and pixels[1:].min() >= 25 and pixels[1:].tolist() == [t['visibility'][0] for t in things]
    )
    assert {t['material'] for t in things} == ({'metal'} if meta['flags']['kind'] == 'metal' else {'metal', 'rubber'})
    assert (image[..., :3] == 255).mean() < 1e-4


def test_the_committed_set_is_finished():
    "The README's command finds nothing left to do, with the libraries that made the set."
    for lib in ('mujoco', 'mitsuba'):
        if pytest.importorskip(lib).__version__ != read_json(DATA / 'render.json')['train'][lib]:
            pytest.skip(f'another {lib} made it')
    before = (DATA / 'render.json').read_text()
    assert r.render(DATA, seed=0, progress=False) == 0
    assert (DATA / 'render.json').read_text() == before


# --- ground truth


@pytest.fixture
def ball_on_floor():
    pytest.importorskip('mujoco')
    eye, ball = (
        np.array([7.5, -6.5, 5.5]),
        p.Thing('sphere', 'large', 'metal', 'red', [0.3, -0.2, 1.4], [1, 0, 0, 0], [0, 0, 0]),
    )
    view = camera.cast_rays(p.physics_model([ball]), np.array([ball.position]), np.array([ball.quaternion]), eye, 48)
    return eye, ball, view, camera.pixel_rays(eye, 48)


def test_depth_is_the_distance_to_the_camera(ball_on_floor):
    eye, ball, view, rays = ball_on_floor
    floor = view.segmentation == 0
    assert view.depth.dtype == np.float32 and floor.any() and not floor.all()
    np.testing.assert_allclose(view.depth[floor], (eye[2] / -rays[..., 2])[floor], rtol=1e-6)
    away = eye - ball.position
    b = (rays[~floor] * away).sum(-1)  # |away + t ray| = radius
    np.testing.assert_allclose(view.depth[~floor], -b - np.sqrt(b * b - away @ away + ball.half**2), rtol=1e-6)


def test_normals_are_unit_in_the_world_and_face_the_camera(ball_on_floor):
    eye, ball, view, rays = ball_on_floor
    on = view.segmentation == 1
    np.testing.assert_allclose(np.linalg.norm(view.normals, axis=-1), 1, atol=1e-6)
    assert ((view.normals * rays).sum(-1) < 0).all()
    np.testing.assert_allclose(view.normals[~on], np.broadcast_to([0, 0, 1], view.normals[~on].shape), atol=1e-6)
    np.testing.assert_allclose(
        view.normals[on], ((eye + view.depth[..., None] * rays - ball.position) / ball.half)[on], atol=1e-5
    )


@pytest.mark.parametrize('shape', p.SHAPES)
def test_normals_of_a_turned_thing_turn_with_it(shape):
    "The hit lies on the surface of the object, and the normal is that of its face."
    mj = pytest.importorskip('mujoco')
    turn = np.array([0.5, 0.5, -0.5, 0.5])  # x to z, y to -x, z to -y
    thing = p.Thing(shape, 'large', 'metal', 'red', [0, 0, 2.0], turn.tolist(), [0, 0, 0])
    eye = np.array([7.0, -6.0, 6.0])
    view = camera.cast_rays(p.physics_model([thing]), np.array([thing.position]), turn[None], eye, 48)
    on, R = view.segmentation == 1, np.zeros(9)
    mj.mju_quat2Mat(R, turn)
    R = R.reshape(3, 3)
    met = (
        (eye + view.depth[..., None] * camera.pixel_rays(eye, 48) - thing.position)[on] @ R / thing.half
    )  # in the thing's own axes
    normal = view.normals[on] @ R
    if shape == 'sphere':
        want = met
    else:
        side = (
            np.abs(met)
            if shape == 'cube'
            else np.stack([0 * met[:, 0], np.hypot(met[:, 0], met[:, 1]), np.abs(met[:, 2])], 1)
        )
        axis = side.argmax(1)
        np.testing.assert_allclose(side.max(1), 1, atol=1e-4)
        want = np.eye(3)[axis] * np.sign(met)
        if shape == 'cylinder':
            want = np.where((axis == 2)[:, None], want, met * [1, 1, 0])
    np.testing.assert_allclose(normal, want, atol=1e-4)


def test_every_thing_has_its_moment():
    pytest.importorskip('mujoco')
    clip = plans.plan_scene(seed=1, index=3, size=64, num_frames=24)
    pixels = np.stack([np.bincount(s.ravel(), minlength=len(clip.things) + 1)[1:] for s in clip.segmentation])
    assert clip.frames == list(range(24)) and pixels.max(0).min() >= plans.pixels_needed(64) == 2
    assert pixels.min() == 0  # nobody is asked to be seen all the time
    assert [t['visibility'] for t in scene_metadata(clip)['instances']] == pixels.T.tolist()


# --- metal as the variable


def test_more_metal_changes_nothing_but_materials():
    pytest.importorskip('mujoco')
    none, half, full = (
        plans.plan_scene(seed=2, index=1, size=32, num_frames=24, min_pixels=0, kind='share', metal=m)
        for m in (0, 0.5, 1)
    )
    assert [{t.material for t in s.things} for s in (none, full)] == [{'rubber'}, {'metal'}]
    for s in (half, full):
        assert np.array_equal(none.segmentation[0], s.segmentation[0])
        assert [(t.shape, t.color, t.velocity) for t in none.things] == [
            (t.shape, t.color, t.velocity) for t in s.things
        ]


def test_range_is_drawn_a_scene_and_written_down():
    pytest.importorskip('mujoco')
    scenes = [plans.plan_scene(index=i, size=32, min_pixels=0, kind='share', metal='0.2..0.6') for i in range(4)]
    shares = [scene_metadata(s)['metadata']['metal_share'] for s in scenes]
    assert len(set(shares)) == 4 and all(0.2 <= s <= 0.6 for s in shares)
    assert 'metal_share' not in scene_metadata(plans.plan_scene(size=32, min_pixels=0))['metadata']


def test_a_textured_floor_changes_nothing_but_the_floor():
    "It is drawn from the scene's seed and recorded; scenes on the grey floor are recorded as before."
    pytest.importorskip('mujoco')
    scene = dict(index=3, size=32, min_pixels=0)
    grey, textured = plans.plan_scene(**scene), plans.plan_scene(**scene, floor='textured')
    assert np.array_equal(grey.segmentation, textured.segmentation)
    assert grey.floor is None and textured.floor.colors.shape == (512, 512, 3)
    assert np.array_equal(textured.floor.colors, plans.plan_scene(**scene, floor='textured').floor.colors)
    before, after = scene_metadata(grey), scene_metadata(textured)
    assert 'floor' not in before['flags'] and before['metadata'].pop('background') == 'clevr'
    assert after['flags'].pop('floor') == 'textured'
    assert after['metadata'].pop('background') == textured.floor.pattern
    assert before == after


def test_the_pattern_lies_on_the_floor_where_it_should():
    "The reflectance at the point that a ray meets explains the image, divided by that of the grey floor."
    pytest.importorskip('mitsuba')
    scene = dict(index=4, size=48, min_pixels=0)
    grey, tiled = plans.plan_scene(**scene), plans.plan_scene(**scene, floor='textured')
    view, floor = tiled.views[0], tiled.floor
    seen = (view.segmentation == 0) & (view.depth < 15)
    ratio = light(tiled, samples=16)[seen].mean(1) / light(grey, samples=16)[seen].mean(1)
    x, y, _ = (tiled.eye + view.depth[..., None] * camera.pixel_rays(tiled.eye, 48))[seen].T
    turn, n = np.exp(-1j * np.radians(floor.angle)), len(floor.colors)
    at = ((x + 1j * y) * turn + 400 * (1 + 1j)) / floor.period * n  # the texture begins at the corner of the floor
    reflectance = floor.colors[at.imag.astype(int) % n, at.real.astype(int) % n].mean(1)
    assert floor.pattern == 'tiles' and np.corrcoef(reflectance, ratio)[0, 1] > 0.8


# --- many scenes

CLI = dict(metal='0..1', frames=3, size=48, samples=4, depth=True, normals=True)


def start(folder, scenes):
    "The job as a user starts it, in a process group of its own."
    code = (
        'from slotnb.scenes.render import render\n'
        f'if __name__ == "__main__": render({str(folder)!r}, {scenes}, workers=2, progress=False, **{CLI})'
    )
    return subprocess.Popen(
        [sys.executable, '-c', code], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True
    )


def wait_for(what, job=None):
    while not what():
        assert job is None or job.poll() is None, job.communicate()[1]
        time.sleep(0.02)


def alive(group):
    "Processes of the group that still run; a dead one that nobody has waited for does not."

    def state(f):
        try:
            head, tail = f.read_text().rsplit(')', 1)
        except OSError:
            return None
        return tail.split()

    found = [state(f) for f in Path('/proc').glob('[0-9]*/stat')]
    return sum(1 for s in found if s and s[2] == str(group) and s[0] not in 'ZX')


def contents(folder):
    files = (f for f in sorted(folder.rglob('*')) if f.is_file() and not f.name.startswith('.owner'))
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_killed_and_resumed_by_two_workers_equals_one(tmp_path):
    pytest.importorskip('mujoco')
    pytest.importorskip('mitsuba')
    job = start(tmp_path / 'two', 5)
    try:
        wait_for(lambda: len(list((tmp_path / 'two').glob('train/scene_*'))) > 1, job)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        wait_for(lambda: not alive(job.pid))  # workers whose parent is gone end by themselves
    finally:
        job.poll() is None and os.killpg(job.pid, signal.SIGKILL)
    assert all((f / 'metadata.json').exists() for f in (tmp_path / 'two').glob('train/scene_*'))
    for i in (3, 1):
        r.render(tmp_path / 'one', i, split='train', progress=False, **CLI)  # another order, another history
    r.render(tmp_path / 'one', 5, progress=False, **CLI)
    assert r.render(tmp_path / 'two', 5, progress=False, **CLI) <= 3
    one, two = contents(tmp_path / 'one'), contents(tmp_path / 'two')
    assert sorted(one) == sorted(two) and len(one) == 1 + 5 * (3 + 3 * 4)
    assert [k for k in one if one[k] != two[k]] == []


@pytest.mark.skipif(sys.platform != 'linux', reason='looks into /proc')
def test_ctrl_c_ends_the_workers_at_once(ctrl_c, tmp_path):
    "Here, while they start; the terminal sends Ctrl-C to them too, and they leave the answer to their parent."
    pytest.importorskip('mujoco')
    pytest.importorskip('mitsuba')

    def ignored(pid):
        return next(
            int(x.split()[1], 16)
            for x in Path(f'/proc/{pid}/status').read_text().splitlines()
            if x.startswith('SigIgn')
        )

    others = active_children()  # a pool of joblib's that an earlier test left waiting

    def workers():
        return [c for c in active_children() if c not in others]

    def interrupt():
        "Once both workers are there and the parent listens again, or not at all if `render` has ended before."
        while not ended.wait(0.02):
            if len(workers()) == 2 and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                deaf.extend(bool(ignored(c.pid) & 1 << signal.SIGINT - 1) for c in workers())
                return os.kill(os.getpid(), signal.SIGINT)

    deaf, ended, thread = [], threading.Event(), threading.Thread(target=interrupt)
    (tmp_path / 'train/.scene_0007.part').mkdir(parents=True)  # as a worker that is killed leaves it
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            r.render(tmp_path, 1000, workers=2, progress=False, **CLI)  # minutes of work
    finally:
        ended.set()
        thread.join()
    assert deaf == [True, True] and not workers()
    assert not list(tmp_path.glob('train/.*')) and len(list(tmp_path.glob('train/*'))) < 1000


@pytest.fixture
def nothing_is_drawn(monkeypatch):
    pytest.importorskip('mujoco')
    pytest.importorskip('mitsuba')
    monkeypatch.setattr(
        r,
        '_make',
        lambda folder, flags, *a: (
            folder.mkdir(parents=True),
            r.write_json(folder / 'metadata.json', dict(flags=flags)),
        ),
    )


@pytest.mark.parametrize(
    'field, value',
    dict(seed=1, size=64, samples=16, frames=2, metal='0..0.5', depth=True, min_pixels=3, floor='textured').items(),
)
def test_other_settings_are_refused_by_name(field, value, nothing_is_drawn, tmp_path):
    same = dict(scenes=2, size=32, samples=4, progress=False)
    assert [r.render(tmp_path, **same), r.render(tmp_path, **same), r.render(tmp_path, **same | dict(scenes=3))] == [
        2,
        0,
        1,
    ]
    if field == 'size':
        same['min_pixels'] = 1
    with pytest.raises(
        SlotnbError,
        match=rf'render.json: train was made with other settings \({field} .* there, .* here\); give the same',
    ):
        r.render(tmp_path, **same | {field: value})
    assert r.render(tmp_path, split='test', **same | {field: value}) == 2  # another split may differ
    assert set(read_json(tmp_path / 'render.json')) == {'train', 'test'}


def test_scenes_without_render_json_are_compared_too(nothing_is_drawn, tmp_path):
    same = dict(scenes=2, size=32, samples=4, progress=False)
    r.render(tmp_path, **same)
    (tmp_path / 'render.json').unlink()
    with pytest.raises(
        SlotnbError, match=r'metadata.json: train was made with other settings \(seed 0 there, 1 here\)'
    ):
        r.render(tmp_path, seed=1, **same)
    with pytest.raises(SlotnbError, match="metal '0.5..0.5' there, '1.0..1.0' here"):
        r.render(tmp_path, metal=1, **same)
    assert r.render(tmp_path, **same) == 0 and (tmp_path / 'render.json').exists()


@pytest.mark.parametrize(
    'bad',
    [
        dict(metal='x'),
        dict(metal='1..0'),
        dict(scenes=0),
        dict(frames=0),
        dict(frames=25),
        dict(samples=5),
        dict(size=4),
        dict(workers=0),
        dict(split='a/b'),
        dict(split=''),
        dict(floor='wood'),
        dict(min_pixels=-1),
    ],
    ids=str,
)
def test_bad_arguments_are_named(bad, tmp_path):
    with pytest.raises(SlotnbError, match=next(iter(bad))):
        r.render(tmp_path / 'out', **dict(scenes=1) | bad)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('missing', ['mujoco', 'mitsuba'])
def test_missing_library_is_named(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == 'mujoco':
        pytest.importorskip('mitsuba')
    with pytest.raises(SlotnbError, match=rf'{missing}.*slotnb\[render\]'):
        r.render(tmp_path, scenes=1)


def test_full_disk_leaves_nothing(monkeypatch, tmp_path):
    pytest.importorskip('mujoco')
    scene = plans.plan_scene(size=32)

    def full(*a, **k):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(Image.Image, 'save', full)
    with pytest.raises(SlotnbError, match='scene_0000: No space left'):
        write_scene(tmp_path / 'scene_0000', scene, [np.zeros((32, 32, 3), np.uint8)])
    assert not list(tmp_path.iterdir())
