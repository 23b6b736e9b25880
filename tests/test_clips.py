"Clips: the committed ones, every format, and rows that are those of the cached features."

import json
import re
import shlex
import numpy as np
import pytest
import torch
from PIL import Image
from conftest import ROOT
from slotnb.core import SlotnbError, generator
from slotnb.formats.convert import convert
from slotnb.formats.detect import open_dataset
from slotnb.scenes.plan import scene_seed
from slotnb.video.clips import clip_chunks, clip_index
from slotnb.video.metrics import evaluate_clip

CLIPS = ROOT / 'data/movi_a_clips'


@pytest.mark.parametrize('split, count', [('train', 24), ('test', 12)])
def test_committed_clips(split, count):
    dataset = open_dataset(CLIPS, split, max_frames=0, progress=False)
    clips = clip_index(dataset, check_sizes=False)
    assert [len(c) for c in clips] == [24] * count
    metal = []
    for c in clips:
        first, last = dataset[c.rows[0]], dataset[c.rows[-1]]
        assert first.image.shape == last.image.shape == (128, 128, 3)
        assert first.materials == last.materials and set(first.materials) <= {'metal', 'rubber'}
        assert 3 <= len(first.instances) <= 10 and last.segmentation.max() <= len(last.instances)
        assert (first.image != last.image).any()
        metal += [m == 'metal' for m in first.materials]
    assert 0.5 < np.mean(metal) < 0.8


def test_card_of_the_clips():
    "At most 8 MB; the commands in the card give the recorded conversion and share no scene with the stills."
    assert sum(p.stat().st_size for p in CLIPS.iterdir()) < 8e6
    commands = re.findall(r'^slotnb (render|data convert) (.*)$', (CLIPS / 'README.md').read_text(), re.M)
    assert len(commands) == 4
    seeds = set()
    for name, rest in commands:
        words = shlex.split(rest)
        flags = {w: words[i + 1 : i + 2] for i, w in enumerate(words) if w.startswith('--')}
        split = flags['--split'][0]
        if name == 'render':
            own = {scene_seed(int(flags['--seed'][0]), split, i) for i in range(int(flags['--scenes'][0]))}
            assert not own & seeds
            seeds |= own
        else:
            recorded = json.loads((CLIPS / f'convert-{split}.json').read_text())
            assert (recorded['webp'], recorded['labels_only']) == (int(flags['--webp'][0]), '--labels_only' in flags)
            assert recorded['source'] == f'{words[0]}/{split}'
    render = json.loads((ROOT / 'data/movi_a_subset/render.json').read_text())
    stills = {scene_seed(render[s]['seed'], s, i) for s, n in (('train', 60), ('test', 24)) for i in range(n)}
    assert len(seeds) == 36 and not seeds & stills


def test_every_format_gives_the_same_clips(tmp_path):
    shards = open_dataset(CLIPS, 'test', max_frames=0, progress=False)
    shards.entries = shards.entries[:48]
    convert(shards, tmp_path, 'kubric', 'test', progress=False)
    kubric = open_dataset(tmp_path, 'test', max_frames=0, progress=False)
    (a, b), (c, d) = clip_index(shards, progress=False), clip_index(kubric, progress=False)
    assert (a.name, b.name) == (c.name, d.name) and torch.equal(b.rows, d.rows) and torch.equal(b.frames, d.frames)
    movi = open_dataset(ROOT / 'tests/fixtures/movi_a/64x64/1.0.0', 'train', max_frames=0, progress=False)
    clips = clip_index(movi, progress=False)
    assert len(clips) == len(movi.scenes) and sum(map(len, clips)) == len(movi)
    with pytest.raises(SlotnbError, match='has 1 of the 2 frames'):
        clip_index(open_dataset(CLIPS, 'test', max_frames=1, progress=False))


def test_a_missing_frame_and_another_size_in_folders(tmp_path):
    shards = open_dataset(CLIPS, 'test', max_frames=5, progress=False)
    shards.entries = shards.entries[:5]
    convert(shards, tmp_path, 'kubric', 'test', progress=False)
    (folder,) = (tmp_path / 'test').iterdir()
    image = shards[4]
    Image.fromarray(image.image[:64]).save(folder / 'rgba_00004.png')
    Image.fromarray(image.segmentation[:64].astype(np.uint8)).save(folder / 'segmentation_00004.png')
    with pytest.raises(SlotnbError, match='frame 4 of clip .* is 128x64, its first frame is 128x128'):
        clip_index(open_dataset(tmp_path, 'test', max_frames=0, progress=False))
    (folder / 'rgba_00002.png').unlink()
    with pytest.raises(SlotnbError, match='goes from frame 1 to frame 3'):
        clip_index(open_dataset(tmp_path, 'test', max_frames=0, progress=False))


def test_chunks_are_rows_of_features():
    dataset = open_dataset(CLIPS, 'train', max_frames=0, progress=False)
    clips = clip_index(dataset, check_sizes=False)
    feats = torch.tensor([[float(i), e.frame] for i, e in enumerate(dataset.entries)])
    chunks = clip_chunks(clips, 4, 'random', generator(0, 'chunks'))
    assert chunks.shape == (24 * 6, 4)
    frames = feats[chunks][..., 1]
    assert (frames.diff(dim=1) > 0).all() and (frames.diff(dim=1) == frames.diff(dim=1)[:, :1]).all()
    names = [{dataset.entries[i].name for i in chunk} for chunk in chunks.tolist()]
    assert all(len(n) == 1 for n in names)


def test_scores_do_not_depend_on_the_numbers_of_slots():
    dataset = open_dataset(CLIPS, 'test', max_frames=6, progress=False)
    true = np.stack([dataset[i].segmentation for i in range(6)])
    rng = np.random.default_rng(0)
    pred = np.where(rng.random(true.shape) < 0.1, rng.integers(0, 5, true.shape), true)
    a, b = evaluate_clip(true, pred), evaluate_clip(true, rng.permutation(12)[pred])
    assert a == pytest.approx(b)
    assert a['fg_ari_video'] < 1 and a['jf_video'] < 1
