"The explorer without a browser: what it computes and reports, and what a run keeps for its replay."

import json
import math
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from conftest import DATA
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders, Sample
from slotnb.evaluate import evaluate, load_run
from slotnb.explorer.clips import thumbnails
from slotnb.explorer.pages import runs_page, same_place, scene_page, segment_colors
from slotnb.explorer.server import serve
from slotnb.explorer.state import State
from slotnb.explorer.viewer import Viewer
from slotnb.explorer.views import NUMBERS, as_bytes, numbers, query, state_warnings
from slotnb.explorer.widget import SlotExplorer
from slotnb.fast.many_models import train_many
from slotnb.formats.detect import open_dataset
from slotnb.metrics import evaluate_scene, hard_masks
from slotnb.plots import colorize, match_colors, overlay
from slotnb.refine import merge_slots, refine_masks
from slotnb.runs.config import PRESETS, TrainConfig
from slotnb.runs.folder import RunState
from slotnb.runs.masks import is_kept, load_tracked_masks
from slotnb.segment.result import enlarge
from slotnb.train import fit

FEW = PRESETS['version_0_1'] | dict(
    data_dir=str(DATA), num_epochs=3, warmup_epochs=1, batch_size=6, slot_dim=32, hidden_dim=32, device='cpu'
)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "Three of different kinds; the first is evaluated."
    folder = tmp_path_factory.mktemp('runs')
    plan = [
        TrainConfig(**FEW | kw, save_dir=str(folder / name))
        for name, kw in dict(
            plain={},
            mlp=dict(decoder='mlp', normalizer='dataset', num_slots=5),
            learned=dict(slot_init='learned', num_slots=6),
        ).items()
    ]
    assert train_many(plan, False) == {}
    evaluate(plan[0].run_dir, False)
    return {c.run_dir.parent.name: c.run_dir for c in plan}


@pytest.fixture(scope='module')
def viewer(runs):
    return Viewer(runs['plain'], show_progress=False)


@pytest.mark.parametrize('source', State.sources)
def test_numbers_are_those_of_evaluate(runs, viewer, source):
    "In the run's own state, scene by scene, and FVU and slot statistics on average."
    table, result = (
        pd.read_csv(runs['plain'] / 'test_scenes.csv'),
        json.loads((runs['plain'] / 'result.json').read_text()),
    )
    found = pd.DataFrame([numbers(viewer.output(State(scene=i, source=source))) for i in range(len(table))])
    for k in ('ari', 'fg_ari', 'mbo', 'miou', 'best_overlap_metal', 'best_overlap_rubber'):
        np.testing.assert_allclose(found[k], table[f'{k}_{source}'], atol=2e-3)
    for k in ('slot_cosine', 'mask_entropy', 'active_slots', 'effective_slots', 'mask_max'):
        assert found[k].mean() == pytest.approx(result[k], abs=1e-3)


def test_slots_have_no_order(viewer):
    shown = viewer.output(State(scene=4))
    order = torch.randperm(11)
    shuffled = shown._replace(
        soft=shown.soft[order],
        labels=np.argsort(order.numpy())[shown.labels],
        out=shown.out._replace(slots=shown.out.slots[:, order], masks=shown.out.masks[:, order]),
    )
    assert numbers(shuffled) == pytest.approx(numbers(shown), abs=1e-5, nan_ok=True)
    colors = segment_colors(shown)[0]
    assert (
        colorize(segment_colors(shuffled, colors, shown.labels)[0][shuffled.labels]) == colorize(colors[shown.labels])
    ).all()


def test_a_run_beside_itself_agrees(viewer):
    "A slot that wins no pixel cannot be matched; all others have the same color and column in both rows."
    page, won = (
        runs_page((viewer, viewer), State(view='runs', scene=3, patch=40)),
        np.unique(viewer.output(State(scene=3)).labels),
    )
    by_key = {p.key: p for p in page.pictures}
    assert (by_key['Asegments'].image == by_key['Bsegments'].image).all() and len(won) > 2
    for i in won:
        assert by_key[f'Aslot-{i}'].color == by_key[f'Bslot-{i}'].color
    columns = [[p.key[1:] for p in page.pictures if p.key.startswith(f'{n}slot')] for n in 'AB']
    assert columns[0][: len(won)] == columns[1][: len(won)]
    for a, b in page.numbers.values():
        assert a == b or math.isnan(a)


def test_each_setting_has_an_effect(viewer):
    output, base = lambda **kw: viewer.output(State(scene=2, **kw)), viewer.output(State(scene=2))
    assert output(temperature=0.1).soft.max(0).values.mean() > base.soft.max(0).values.mean()
    assert output(temperature=0.5).soft.allclose(base.soft)  # its own
    assert output(num_slots=4).soft.shape == (4, 256) and len(output(num_iters=5).iterations) == 5
    assert output(num_iters=5).iterations[2].allclose(base.iterations[2]) and not output(seed=7).soft.allclose(
        base.soft
    )
    assert output(normalizer='none').x.equal(base.raw) and output(source='attn').soft.allclose(base.out.attn[0])
    fitted = viewer.normalizer('dataset')
    assert fitted.fitted and fitted.std.min() > 0 and not fitted.std.allclose(torch.ones(384))


def test_query_and_cosine(viewer):
    page = {p.key: p for p in scene_page(viewer, State(scene=2, patch=37)).pictures}
    soft = viewer.output(State(scene=2)).soft[:, 37]
    assert query(viewer, State(scene=2, patch=37)).startswith(
        f'patch in row 2, column 5: slot {soft.argmax()} holds {100 * soft.max():.0f} %'
    )
    assert (page['cosine-0'].image[2, 5] == page['cosine-1'].image[2, 5]).all() and page['cosine-0'].image[
        2, 5
    ].tolist()[:2] > [250, 230]  # cosine 1, the yellow end
    assert same_place(255, (16, 16), (32, 32)) == 30 * 32 + 30
    with pytest.raises(SlotnbError, match='patch 256 does not exist; the grid has 256'):
        scene_page(viewer, State(patch=256))


def test_warning_when_settings_differ_from_training(runs, viewer):
    warn = lambda v, **kw: state_warnings(v, State(**kw), dict(mask_entropy=0, largest_share=0, slot_cosine=0))
    assert warn(viewer) == [] and warn(viewer, normalizer='token') == [
        'dinov2_vits14 was trained with other settings: normalizer token instead of instance'
    ]
    learned = Viewer(runs['learned'], viewer.scenes, show_progress=False)
    assert (
        'num slots stays 6, because its slots are learned' in warn(learned, num_slots=9)[0]
        and len(learned.output(State(num_slots=9)).soft) == 6
    )
    assert 'seed stays 0, because its slots are learned' in warn(learned, seed=9)[0]
    assert Viewer(runs['mlp'], viewer.scenes, show_progress=False).output(State(num_slots=8)).out.masks.shape == (
        1,
        8,
        256,
    )  # the MLP decoder accepts any number


def test_without_ground_truth(runs, tmp_path):
    "Photographs: nothing is shown that needs ground truth."
    for i in range(2):
        Image.fromarray(KubricFolders(DATA, 'test')[i].image[:, :200]).save(tmp_path / f'{i}.png')
    e = SlotExplorer(runs['plain'], tmp_path)
    assert e.error == '' and 'ground_truth' not in e.pictures and e.pictures['segments'].image.shape == (256, 200, 3)
    assert list(e.page.numbers) == [
        k for k in NUMBERS if k in ('fvu', 'slot_cosine', 'effective_slots', 'active_slots', 'mask_entropy', 'mask_max')
    ]
    assert 'FG-ARI' not in e.panel.numbers.value


@pytest.mark.parametrize('source', State.sources)
def test_the_segments_that_are_scored_are_those_that_are_shown(viewer, source):
    "Picture and scores follow from the same labels, computed here from the model's output alone."
    page, out = scene_page(viewer, State(scene=5, source=source)), viewer.output(State(scene=5)).out
    sample, x = viewer.sample(5), viewer.output(State(scene=5)).x
    soft = out.masks[0] if source == 'masks' else out.attn[0]
    if source in ('merged', 'refined'):
        soft = merge_slots(soft, x, viewer.grid)
    size = sample.image.shape[:2]
    labels = refine_masks(sample.image, soft, grid=viewer.grid) if source == 'refined' else hard_masks(soft, size)
    colors = match_colors(sample.segmentation, labels, int(labels.max()) + 1)
    shown = next(p.image for p in page.pictures if p.key == 'segments')
    assert (shown == as_bytes(overlay(sample.image, labels, colors))).all()
    for k, v in evaluate_scene(sample.segmentation, labels).items():
        assert page.numbers[k][0] == pytest.approx(v, nan_ok=True)


def test_a_picture_of_ones_own_is_segmented_as_by_the_run(runs, tmp_path):
    "By path or as a file of the browser, in parts; its labels are those of `Run.segment`."
    Image.fromarray(KubricFolders(DATA, 'test')[3].image).resize((640, 400)).save(tmp_path / 'cup.jpg', quality=95)
    e, content = SlotExplorer(runs['plain']), (tmp_path / 'cup.jpg').read_bytes()
    assert e.viewer().loading.ident is None
    e._on_message(e.thumbs, dict(kind='ready'), [])  # what the browser sends after the first pictures
    e.add_picture(tmp_path / 'cup.jpg')
    assert e.error == '' and e.viewer().loading.ident and e.state == dict(view='scene', scene=24, source='refined')
    assert e.controls['scene'].max == 24 and e.gallery.link == 'view=scene', 'a link cannot name the picture'
    segmented = load_run(runs['plain']).segment(tmp_path / 'cup.jpg')
    shown = e.viewer().output(e.current)
    assert shown.labels.shape == (320, 512) and segmented.num_segments > 0
    assert (enlarge(shown.labels.astype(np.int32), (400, 640)) == segmented.labels).all()
    message, half = dict(kind='file', id=0.5, name='cup.jpg', size=len(content)), len(content) // 2
    e._on_message(e.thumbs, message, [content[:half]])
    assert len(e.added) == 1
    start = time.process_time()
    e._on_message(e.thumbs, message, [content[half:]])
    assert time.process_time() - start < 2, 'seconds of a CPU from the file to its slots'
    assert [s.name for s in e.added] == ['cup', "cup'"] and (e.viewer().output(e.current).labels == shown.labels).all()
    e._on_message(e.thumbs, message | dict(id=1, name='notes.txt', size=3), [b'abc'])
    assert 'notes.txt cannot be read' in e.error and len(e.added) == 2
    e._on_message(e.thumbs, message | dict(id=2, name='film.mov', size=2**30), [])
    assert e.error == 'film.mov has 1024 MiB; choose a picture of at most 100 MiB'
    e.state = dict(scene=0)
    assert e.error == '' and 'ground_truth' in e.pictures


def test_save_all_masks_writes_what_the_command_writes(runs, few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    e = SlotExplorer(runs['plain'], few_scenes)
    save = e.panel.save
    save.click()
    save.thread.join()
    name, out = next(iter(e.runs)), tmp_path / f'masks/{runs["plain"].parent.name}/{next(iter(e.runs))}'
    assert f'{out}: 2 images' in save.text.value and save.bar.value == 2 and name == 'dinov2_vits14'
    save.show(save.command, few := e.viewer().scenes, [])
    assert (
        main(['segment', str(few_scenes), '--split=test', f'--run={runs["plain"]}', f'--out={tmp_path / "cli"}']) == 0
    )
    files = {p.relative_to(tmp_path / 'cli') for p in (tmp_path / 'cli').rglob('*') if p.is_file()}
    assert files == {p.relative_to(out) for p in out.rglob('*') if p.is_file()} and len(few) == 2
    for path in files - {Path('contact_sheet.png')}:  # a file of matplotlib
        assert (out / path).read_bytes() == (tmp_path / 'cli' / path).read_bytes(), path
    e.state = dict(num_slots=4, source='merged')
    assert (
        save.folder.placeholder == f'masks/{out.parent.name}/{name}-4-slots-unrefined' and '4 slots' in save.text.value
    )
    save.folder.value = str(out)
    save.click()
    save.thread.join()
    assert 'holds masks of other settings' in save.text.value and 'slotnb-error' in save.text.value
    save.folder.value = 'stopped'
    count = save._count
    with monkeypatch.context() as patch:
        patch.setattr(save, '_count', lambda out: (count(out), save.click()))  # stop at the second image
        save.click()
        save.thread.join()
    assert 'stopped before image 2' in save.text.value and len(list((tmp_path / 'stopped').glob('labels/*.png'))) == 1
    save.click()
    save.thread.join()
    assert 'stopped: 2 images' in save.text.value
    given = SlotExplorer(load_run(runs['plain']), e.viewer().scenes)
    assert given.panel.save.button.disabled and 'give its folder' in given.panel.save.text.value


def test_a_second_run_is_chosen_in_a_list_of_folders(runs):
    e = SlotExplorer(runs['plain'])
    e.controls['view'].value = 'runs'
    assert 'two runs are needed' in e.error and e.panel.picker.layout.display == ''
    labels = [label for label, _ in e.panel.picker.list.options]
    assert labels[:3] == [f'run: {name}/dinov2_vits14' for name in ('learned', 'mlp', 'plain')]
    e.panel.picker.list.index = 1
    e.panel.picker.button.click()
    assert e.error == '' and e.state == dict(view='runs', compare='mlp/dinov2_vits14')
    assert e.page.columns == ('dinov2_vits14', 'mlp/dinov2_vits14') and e.panel.picker.layout.display == 'none'
    e.state = dict(view='training', source='refined')
    assert any("refined masks are not kept over the epochs: the decoder's are shown" in w for w in e.page.warnings)


def test_frames(runs, few_scenes):
    "Two frames of a scene: the slider is shown only if there is more than one."
    first = sorted((few_scenes / 'test').iterdir())
    for name in ('rgba', 'segmentation'):
        shutil.copy(first[1] / f'{name}_00000.png', first[0] / f'{name}_00001.png')
    meta = [json.loads((p / 'metadata.json').read_text()) for p in first]
    if len(meta[1]['instances']) > len(meta[0]['instances']):
        shutil.copy(first[1] / 'metadata.json', first[0] / 'metadata.json')
    e = SlotExplorer(runs['plain'], open_dataset(few_scenes, 'test', 0))
    still = SlotExplorer(runs['plain'])
    assert (
        e.error == ''
        and e.controls['frame'].max == 1
        and e.controls['frame'].layout.display == ''
        and still.controls['frame'].layout.display == 'none'
    )
    before = e.pictures['image'].image
    e.controls['frame'].value = 1
    assert e.error == '' and e.state['frame'] == 1 and (before != e.pictures['image'].image).any()
    e.controls['scene'].value = 1
    assert 'frame' not in e.state and e.controls['frame'].layout.display == 'none'


def test_large_photographs_are_shrunk(runs, tmp_path):
    Image.fromarray(KubricFolders(DATA, 'test')[0].image).resize((1600, 1200)).save(tmp_path / 'a.jpg')
    e = SlotExplorer(runs['plain'], tmp_path)
    assert e.error == '' and e.pictures['image'].image.shape == e.pictures['segments'].image.shape == (384, 512, 3)


def test_missing_library_is_named(runs, monkeypatch):
    monkeypatch.setitem(sys.modules, 'voila', None)
    with pytest.raises(SlotnbError, match=r'voila, which is not installed; pip install slotnb\[explore\]'):
        serve([str(runs['plain'])])


def test_random_weights_are_stamped(tmp_path):
    run = fit(TrainConfig(**FEW | dict(num_epochs=1, weights='random', save_dir=str(tmp_path))), False)
    e = SlotExplorer(run)
    assert (
        'RANDOM WEIGHTS' in e.page.warnings[0]
        and 'RANDOM WEIGHTS' in e.pictures['pca-0'].title
        and e.pictures['pca-0'].image.shape == (256, 256, 3)
    )


def test_state_survives_a_link(runs):
    state = State(view='runs', scene=3, source='attn', temperature=0.25, num_slots=5, seed=9, patch=17)
    assert State.read(state.changed()) == state == State.read(dict(parse_qsl(state.link)))
    a, b = (SlotExplorer(list(runs.values())[:2], state=s) for s in (state.changed(), None))
    b.state = a.state
    assert (
        a.error == b.error == ''
        and a.state == b.state
        and a.page.numbers == b.page.numbers
        and a.controls['seed'].value == 9
        and a.controls['view'].value == 'runs'
    )
    assert all((a.pictures[k].image == b.pictures[k].image).all() for k in a.pictures)


def test_saved_pictures(runs, tmp_path):
    e = SlotExplorer(runs['plain'], state=dict(scene=1))
    for path in e.save(tmp_path / 'out'):
        assert (np.asarray(Image.open(path)) == e.pictures[path.stem].image).all()
    assert json.loads((tmp_path / 'out/state.json').read_text()) == dict(view='scene', scene=1)


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    "A run of another machine with custom parts, among them a normalizer without `inverse`."
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'explorer_parts.py').write_text(
        """from torch import nn
from slotnb.decoder import AttentionDecoder
from slotnb.slot_attention import SlotAttention

class Halve(nn.Module):
    def forward(self, feats):
        return feats / 2

class Attention(nn.Module):
    def __init__(self, slot_dim):
        super().__init__()
        self.inner = SlotAttention(slot_dim, num_iters=2)

    def forward(self, inputs, slots):
        return self.inner(inputs, slots)

class Decoder(nn.Module):
    def __init__(self, slot_dim, feat_dim):
        super().__init__()
        self.inner = AttentionDecoder(slot_dim, feat_dim)

    def forward(self, slots, logits):
        return self.inner(slots, logits)
"""
    )
    parts = dict(normalizer='Halve', slot_attention='Attention', decoder='Decoder')
    settings = {k: f'explorer_parts:{v}' for k, v in parts.items()}
    run = fit(TrainConfig(**FEW | settings | dict(num_epochs=1, save_dir=str(tmp_path / 'run'))), False)
    about = json.loads((run / 'config.json').read_text())
    (run / 'config.json').write_text(json.dumps(about | dict(signature='')))
    return run


def test_custom_parts(foreign, runs):
    "Refused in one sentence until trusted; then shown, without what such parts do not provide."
    e = SlotExplorer(foreign)
    assert (
        "imports the module 'explorer_parts'" in e.error
        and 'trust=True' in e.error
        and 'slotnb-error' in e.messages.value
    )
    with pytest.raises(SlotnbError, match='pass --allow_custom_code'):
        serve([str(foreign)])
    e = SlotExplorer([foreign, runs['plain']], trust=True)
    assert e.error == '' and 'fvu' in e.page.numbers and 'iteration-1' not in e.pictures
    assert e.pictures['pca-1'].title == 'PCA, Halve' and e.controls['normalizer'].value == 'explorer_parts:Halve'
    assert e.page.warnings[0] == 'attention per iteration is left out: the slot_attention of dinov2_vits14 is custom'
    assert [k for k in ('temperature', 'num_slots', 'num_iters', 'seed') if e.controls[k].disabled] == [
        'temperature',
        'num_slots',
        'num_iters',
    ]
    e.state = dict(scene=2, num_slots=5, temperature=0.1, num_iters=7, normalizer='instance')
    assert e.error == '' and len([k for k in e.pictures if k.startswith('slot-')]) == 11
    assert sum('stays' in w for w in e.page.warnings) == 3
    for view in ('runs', 'training'):
        e.state = dict(view=view)
        assert e.error == ''


def test_errors_are_sentences(runs, tmp_path, capfd):
    e = SlotExplorer(runs['plain'])
    for path, why in (
        ('nowhere', "run 'nowhere' does not exist"),
        (tmp_path, 'holds no run'),
        (DATA / 'train', 'holds no run'),
    ):
        wrong = SlotExplorer(path)
        assert why in wrong.error and 'slotnb-error' in wrong.messages.value
    for state, why in (
        (dict(scene=99), 'scenes go from 0 to 23'),
        (dict(frame=1), 'scene 0 has 1'),
        (dict(colour=1), "'colour' is unknown"),
        (dict(view='runs'), 'two runs are needed'),
        (dict(run='other'), "run 'other' is unknown"),
    ):
        e.state = state
        assert why in e.error and 'slotnb-error' in e.messages.value, e.error
    e.state = dict(scene=1)
    assert e.error == '' and 'slotnb-error' not in e.messages.value
    (tmp_path / 'config.json').write_text((runs['plain'] / 'config.json').read_text())
    started = SlotExplorer(tmp_path)
    assert 'best_model.safetensors is missing' in started.error
    started.state = dict(view='training')
    assert 'no epoch has ended' in started.error
    with pytest.raises(SlotnbError, match='does not exist'):
        serve(['nowhere'])


def test_history_of_all_trainers_is_one(runs, tmp_path):
    "`train_many` and `fit` keep the same images, epochs and, to half precision, masks."
    alone = fit(TrainConfig(**FEW, save_dir=str(tmp_path / 'alone')), False)
    a, b = load_tracked_masks(alone), load_tracked_masks(runs['plain'])
    assert (
        a.epochs.tolist() == b.epochs.tolist() == [0, 1, 2]
        and a.index.equal(b.index)
        and a.attn.shape == (3, 2, 11, 256)
    )
    for x, y in ((a.attn, b.attn), (a.masks, b.masks)):
        assert (x.float() - y.float()).abs().mean() < 1e-3
    assert not a.attn[0].equal(a.attn[2])


def test_interrupted_run_leaves_the_same_file(tmp_path, monkeypatch):
    whole = fit(TrainConfig(**FEW | dict(num_epochs=6), save_dir=str(tmp_path / 'whole')), False)
    config, end = TrainConfig(**FEW | dict(num_epochs=6), save_dir=str(tmp_path / 'killed')), RunState.end_epoch

    def stop(self, *found):
        if self.epoch == 3:
            self.save_every = math.inf  # nothing is saved any more; the kept masks are ahead of the state
        shown = end(self, *found)
        if self.epoch == 5:
            raise KeyboardInterrupt
        return shown

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(RunState, 'end_epoch', stop)
        fit(config, False, 0.0)
    assert load_tracked_masks(config.run_dir).epochs.tolist() == [0, 1, 2, 3, 4]
    fit(config, False)
    assert (config.run_dir / 'epochs.safetensors').read_bytes() == (whole / 'epochs.safetensors').read_bytes()


def test_few_epochs_are_kept():
    for n in (1, 20, 60, 200, 1000):
        kept = [e for e in range(n) if is_kept(e, n)]
        assert kept[-1] == n - 1 and len(kept) <= 45 and kept[:10] == list(range(min(n, 10)))


def test_replay_follows_a_run_in_training(tmp_path, monkeypatch):
    config, end = TrainConfig(**FEW, save_dir=str(tmp_path)), RunState.end_epoch
    explorers = []

    def watch(self, *found):
        shown = end(self, *found)
        if self.epoch == 1:
            explorers.append(SlotExplorer(config.run_dir, state=dict(view='training')))
        e = explorers[0]
        e._on_message(e.gallery, dict(kind='tick'), [])  # what the browser's clock sends
        assert (
            e.error == ''
            and e.controls['epoch'].value == self.epoch - 1
            and e.pictures['soft-0'].title.endswith(f'epoch {self.epoch - 1}')
        )
        assert (e.gallery.clock > 0) == (self.epoch < 3) and any('not finished' in w for w in e.page.warnings) == (
            self.epoch < 3
        )
        return shown

    with monkeypatch.context() as m:
        m.setattr(RunState, 'end_epoch', watch)
        fit(config, False)
    e = explorers[0]
    e.play.value = True
    assert e.controls['epoch'].value == 0
    for _ in range(3):
        e._on_message(e.gallery, dict(kind='tick'), [])
    assert e.controls['epoch'].value == 2 and not e.play.value and e.gallery.clock == 0
    history = load_tracked_masks(config.run_dir)
    sample = open_dataset(DATA, 'train')[int(history.index[0])]
    hard = hard_masks(history.masks[2, 0], sample.image.shape[:2])
    assert (
        e.pictures['image-0'].image.shape == sample.image.shape
        and evaluate_scene(sample.segmentation, hard)['ari'] <= 1
    )


def test_thumbnails_say_which_picture_they_are():
    cup = Sample('cup', 0, Path('cup'), np.zeros((8, 8, 3), np.uint8), None, [], False)
    (picture,), _ = thumbnails({'scene-3': cup}, 'scene-3')
    assert picture.alt == 'scene 3: cup'  # shown when the mouse rests on it
