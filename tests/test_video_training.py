"Training on clips: the same loop, resumed to the last digit, from a still run or from nothing; what is refused."

import json
from dataclasses import replace
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from slotnb.cli import main
from slotnb.core import SlotnbError, read_json, write_json
from slotnb.data import read_segmentation
from slotnb.evaluate import evaluate, load_run
from slotnb.explorer.state import State
from slotnb.explorer.widget import SlotExplorer
from slotnb.runs import folder
from slotnb.runs.checkpoints import load_tensors, save_tensors
from slotnb.runs.config import STILL, TrainConfig
from slotnb.runs.identity import run_key
from slotnb.runs.inputs import data_key, prepare
from slotnb.runs.state import read_metrics
from slotnb.train import fit

TINY = dict(
    weights='random', resolution='56', num_epochs=3, warmup_epochs=1, rounds=2, space_dim=8, slot_dim=16, num_slots=4,
    batch_size=4, device='cpu', mode='video', max_frames=0, clip_length=3,
)  # fmt: skip


def make_clips(root, train=5, test=2, frames=6):
    "Clips of two squares that move over a floor, in Kubric's layout."
    for split, n in (('train', train), ('test', test)):
        for scene in range(n):
            rng, out = np.random.default_rng(scene + 100 * (split == 'test')), root / split / f'scene_{scene:04d}'
            out.mkdir(parents=True)
            colors, place, speed = (
                rng.integers(60, 255, (2, 3)),
                rng.integers(0, 30, (2, 2)),
                rng.integers(0, 3, (2, 2)),
            )
            for t in range(frames):
                image, seg = np.full((56, 56, 3), 40, np.uint8), np.zeros((56, 56), np.uint8)
                for i in range(2):
                    y, x = np.minimum(place[i] + t * speed[i], 36)
                    image[y : y + 20, x : x + 20], seg[y : y + 20, x : x + 20] = colors[i], i + 1
                Image.fromarray(image).save(out / f'rgba_{t:05d}.png')
                Image.fromarray(seg).save(out / f'segmentation_{t:05d}.png')
            write_json(out / 'metadata.json', dict(instances=[dict(material='metal'), dict(material='rubber')]))
    return root


@pytest.fixture(scope='module')
def clips(tmp_path_factory):
    return make_clips(tmp_path_factory.mktemp('clips'))


def config(clips, save_dir, **other):
    return TrainConfig(**TINY | dict(data_dir=str(clips), save_dir=str(save_dir)) | other)


def test_resumed_equals_uninterrupted(clips, tmp_path, monkeypatch):
    "Interrupted after the row of an epoch is written: metrics, masks and weights to the last digit. (slow/: SIGKILL)"
    whole, stopped = (config(clips, tmp_path / name, loss='contrast', rounds=1) for name in ('whole', 'stopped'))
    fit(whole, show_progress=False)
    append = folder._append

    def append_and_stop(path, row):
        append(path, row)
        if row['epoch'] == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(folder, '_append', append_and_stop)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, show_progress=False, save_every=0.0)
    monkeypatch.undo()
    fit(stopped, show_progress=False)
    for file in ('metrics.csv', 'epochs.safetensors', 'best_model.safetensors', 'last_state.safetensors'):
        assert (whole.run_dir / file).read_bytes() == (stopped.run_dir / file).read_bytes(), file


def test_run_from_nothing(clips, tmp_path):
    "The first round is a run of stills, the last one a video run; both are read and scored."
    run_dir = fit(config(clips, tmp_path), show_progress=False)
    first, last = load_run(run_dir / 'round1/dinov2_vits14'), load_run(run_dir)
    assert (first.config.mode, last.config.mode) == ('still', 'video') and not hasattr(first.model, 'predictor')
    rows = read_metrics(run_dir)
    columns = [f'val_{name}' for name in ('slot_response', 'place_overlap', 'start_growth', 'fvu_growth')]
    assert rows[columns[2:]].notna().all(axis=None) and len(rows) == 3
    assert rows[columns[:2]].isna().all(axis=None)  # one clip is held out, so there is nothing to compare
    result = evaluate(run_dir, show_progress=False)
    assert 0 <= result['fg_ari_refined'] <= 1
    by_clip = pd.read_csv(run_dir / 'test_clips.csv')
    assert by_clip.scene.tolist() == ['scene_0000', 'scene_0001']
    for name in ('fg_ari', 'ari', 'mbo'):
        assert result[f'{name}_video'] == pytest.approx(by_clip[f'{name}_video'].mean())


@pytest.fixture(scope='module')
def video_run(clips, tmp_path_factory):
    return fit(config(clips, tmp_path_factory.mktemp('run'), rounds=1, num_epochs=1), show_progress=False)


def test_the_explorer_plays_a_clip(clips, video_run):
    "Every tick shows the next frame, a thumbnail leads to its frame, and a slot keeps its color."
    e = SlotExplorer(video_run, state=dict(view='clip'))
    assert not e.error and [p['key'] for p in e.gallery.pictures if 'frame' in p['key']] == [
        f'frame-{t}' for t in range(6)
    ]
    assert 'frame 1 of 6' in e.panel.numbers.value and e.gallery.clock == 0
    e.play.value = True
    seen = []
    for _ in range(6):
        e._on_message(e.gallery, dict(kind='tick'), [])
        seen.append(e.state.get('frame', 0))
    assert seen == [1, 2, 3, 4, 5, 0] and e.gallery.clock == 83 and not e.error
    e._on_message(e.gallery, dict(kind='click', key='frame-4', x=0.5, y=0.5), [])
    assert e.state['frame'] == 4
    colors = [e.viewer().output(State(frame=t)).colors for t in range(6)]
    assert all((c == colors[0]).all() for c in colors)
    e.state = dict(view='scene', frame=2)
    assert not e.error and 'segments' in e.pictures


def test_the_explorer_saves_the_masks_and_a_film_of_each_clip(clips, video_run, tmp_path):
    e = SlotExplorer(video_run)
    assert 'a film of each clip' in e.panel.save.text.value
    assert 'clip' in dict(e.controls['view'].options)
    e.panel.save.folder.value = str(tmp_path)
    e.panel.save.click()
    e.panel.save.thread.join()
    assert '12 images, 2 films' in e.panel.save.text.value
    assert e.panel.save.folder.placeholder == f'masks/{video_run.parent.name}/dinov2_vits14'
    e.state = dict(view='clip')
    assert e.panel.play.description == '▶ play'
    e.play.value = True
    assert e.panel.play.description == '■ stop'
    e.play.value = False
    e.state = dict(view='training')
    assert e.panel.play.description == '▶ replay'
    assert {p.name for p in (tmp_path / 'films').glob('*')} == {'scene_0000.gif', 'scene_0001.gif'}


def test_segments_of_a_clip_keep_their_labels(clips, video_run, tmp_path):
    "`slotnb segment` carries slots; a clip of which one frame is missing is done anew, to the same labels."
    run_dir, out = video_run, tmp_path / 'masks'
    args = ['segment', str(clips), '--split', 'test', '--run', str(run_dir), '--out', str(out), '--film', 'gif']
    assert main(args) == 0
    paths = sorted((out / 'labels').rglob('*.png'))
    before = {p: read_segmentation(p) for p in paths}
    assert len(paths) == 12 and [p.name for p in sorted((out / 'films').iterdir())] == [
        'scene_0000.gif',
        'scene_0001.gif',
    ]
    with Image.open(out / 'films/scene_0000.gif') as film:
        assert film.size == (56, 56) and film.info['duration'] == 80  # 12 frames a second, in hundredths of a second
    run = load_run(run_dir)
    found = [x for x in run.segment(clips / 'test') if x.name == 'scene_0001']
    assert (
        all((x.labels == before[out / f'labels/scene_0001/{x.frame:05}.png']).all() for x in found) and len(found) == 6
    )
    paths[-2].unlink()
    assert main(args) == 0
    assert all((read_segmentation(p) == labels).all() for p, labels in before.items())
    (clips_gap := tmp_path / 'gap').mkdir()
    for name in ('rgba_00000.png', 'rgba_00002.png'):
        (clips_gap / 'test/a').mkdir(parents=True, exist_ok=True)
        (clips_gap / 'test/a' / name).write_bytes((clips / 'test/scene_0000' / name).read_bytes())
    with pytest.raises(SlotnbError, match="goes from frame 0 to frame 2"):
        [*run.segment(clips_gap / 'test')]
    with pytest.raises(SlotnbError, match='shifts'):
        run.segmenter(shifts=2)


def test_held_out_are_whole_clips(clips, tmp_path):
    data = prepare(config(clips, tmp_path, val_fraction=0.4), show_progress=False)
    assert [len(data.clips[k]) for k in ('train', 'val', 'test')] == [3, 2, 2]
    rows = {k: getattr(data, k).index.view(-1, 6) for k in ('train', 'val')}
    for frames in rows.values():  # whole clips, in order
        assert (frames[:, 0] % 6 == 0).all() and (frames.diff(dim=1) == 1).all()
    assert {*rows['train'][:, 0].tolist(), *rows['val'][:, 0].tolist()} == {*range(0, 30, 6)}
    for k in rows:
        assert torch.cat([c.rows for c in data.clips[k]]).tolist() == [*range(rows[k].numel())]


def test_warm_start_takes_space_and_weights(clips, tmp_path):
    "Before the first step the video model gives the masks of the still run, frame by frame."
    still = config(clips, tmp_path / 'still', mode='still', **{k: v[0] for k, v in STILL.items()})
    warm = config(clips, tmp_path / 'warm', warm_start=str(fit(still, show_progress=False)), lr=1e-12, num_epochs=1)
    assert len(warm.round_configs) == 1
    ours, theirs = load_run(fit(warm, show_progress=False)), load_run(still.run_dir)
    assert ours.normalizer.directions.equal(theirs.normalizer.directions)
    feats = prepare(warm, show_progress=False).test[:4]
    assert torch.allclose(ours.predict(feats).recon, theirs.predict(feats).recon, atol=1e-4)
    with pytest.raises(SlotnbError, match='space_dim 8, this run has 4'):
        fit(replace(warm, space_dim=4, save_dir=str(tmp_path / 'other')), show_progress=False)


@pytest.mark.parametrize(
    'settings, words',
    [
        (dict(max_frames=1), 'max_frames 1 leaves no clip'),
        (dict(max_frames=2), 'max_frames 2 leaves no clip of 3 frames'),
        (dict(resize='letterbox'), "mode 'video': resize 'letterbox'"),
        (dict(slot_attention='multihead'), 'slot_attention'),
        (dict(engine='fast'), "engine 'fast'"),
        (dict(mode='still', clip_length=4, loss='contrast'), "mode 'still': loss 'contrast'"),
        (dict(mode='still', clip_length=4, carry='hidden'), "mode 'still': carry 'hidden'"),
        (dict(mode='still'), "mode 'still': clip_length 3"),
        (dict(clip_length=1), 'clip_length 1 must be at least 2'),
        (dict(carry='gru'), 'one of cell, hidden'),
        (dict(predictor='lstm'), 'one of identity, xavier, none'),
        (dict(mode='film'), 'one of still, video'),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, words):
    with pytest.raises(SlotnbError, match=words):
        TrainConfig(**TINY | settings)


def test_clips_that_do_not_fit_are_refused(clips, tmp_path):
    with pytest.raises(SlotnbError, match='has 6 of the 9 frames'):
        prepare(config(clips, tmp_path, clip_stride=4), show_progress=False)
    with pytest.raises(SlotnbError, match='one training clip'):
        prepare(config(make_clips(tmp_path / 'one', train=1), tmp_path), show_progress=False)


def test_an_old_still_run_keeps_its_identity(clips, tmp_path):
    "A config.json without the settings of mode video resumes, with the key that its checkpoints carry."
    still = config(clips, tmp_path, mode='still', rounds=1, **{k: v[0] for k, v in STILL.items()})
    run_dir = fit(still, show_progress=False)
    before = (run_dir / 'metrics.csv').read_bytes()
    about = read_json(run_dir / 'config.json')
    del about['digest']
    for name in ('mode', *STILL):
        if name != 'loss':
            del about['config'][name]
    write_json(run_dir / 'config.json', about)
    for name in ('last_state', 'best_model'):
        tensors, meta = load_tensors(run_dir / f'{name}.safetensors')
        meta = {k: json.loads(v) if k != 'run' else run_key(about) for k, v in meta.items()}
        save_tensors(run_dir / f'{name}.safetensors', tensors, **meta)
    assert load_run(run_dir).config == still
    fit(still, show_progress=False)
    assert (run_dir / 'metrics.csv').read_bytes() == before
    with pytest.raises(SlotnbError, match="mode 'still' there, 'video' here"):
        fit(replace(still, mode='video'), show_progress=False)


def test_video_and_still_read_other_data(clips, tmp_path):
    video = config(clips, tmp_path)
    assert data_key(video) == data_key(replace(video, carry='hidden', clip_length=4, loss='contrast', next_iters=1))
    assert data_key(video) != data_key(replace(video, mode='still', clip_length=4))
