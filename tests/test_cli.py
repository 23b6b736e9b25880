"The command line on data of every kind, from the path to the last number."

import json
import re
import subprocess
from dataclasses import fields, replace
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import DATA, ROOT
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.evaluate import evaluate, load_run
from slotnb.formats.detect import open_dataset
from slotnb.runs.config import TrainConfig
from slotnb.runs.folder import RunState
from slotnb.runs.inputs import frozen_backbone
from slotnb.runs.shipped import pack
from slotnb.train import lr_at

MOVI = str(ROOT / 'tests/fixtures/movi_a/64x64/1.0.0')


def slotnb(capsys, *args):
    code = main([str(a) for a in args])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_info_then_convert_then_info_again(tmp_path, capsys):
    code, first, _ = slotnb(capsys, 'data', 'info', MOVI, '--max_frames', 0, '--out', tmp_path / 'a.png')
    assert code == 0 and 'MOVi records' in first and Image.open(tmp_path / 'a.png').size[0] > 200
    for fmt in 'webdataset', 'kubric':
        code, said, _ = slotnb(capsys, 'data', 'convert', MOVI, tmp_path / fmt, '--format', fmt)
        assert code == 0 and 'frames as ' + fmt in said
        code, again, _ = slotnb(capsys, 'data', 'info', tmp_path / fmt, '--max_frames', 0, '--out', '')
        keep = lambda text: [
            l for l in text.splitlines() if l.split()[0] in ('scenes', 'frames', 'sizes', 'objects', 'materials')
        ]
        assert code == 0 and keep(again) == keep(first)


@pytest.fixture
def photographs(tmp_path):
    "Without truth, not square, and one of them broken; the names are not ASCII."
    rng, root = np.random.default_rng(0), tmp_path / '写真 folder'
    for split, n in dict(train=6, test=2).items():
        (root / split).mkdir(parents=True)
        for i in range(n):
            Image.fromarray(rng.integers(0, 255, (60, 90, 3), np.uint8)).save(root / f'{split}/写真 {i}.jpg')
    (root / 'train/broken.jpg').write_bytes(b'')
    return root


def test_train_on_photographs(tmp_path, photographs, capsys):
    args = [
        'train',
        '--preset',
        'version_0_1',
        '--data_dir',
        photographs,
        '--weights',
        'random',
        '--resolution',
        '56x84',
        '--grid_size',
        'native',
        '--num_epochs',
        2,
        '--warmup_epochs',
        1,
        '--slot_dim',
        32,
        '--hidden_dim',
        32,
        '--num_slots',
        4,
        '--device',
        'cpu',
        '--save_dir',
        tmp_path / 'run',
    ]
    code, _, err = slotnb(capsys, *args)
    assert code == 2 and 'broken.jpg' in err and len(err.strip().splitlines()) == 1
    code, out, err = slotnb(capsys, *args, '--skip_broken')
    assert (
        code == 0 and '1 broken samples left out' in out + err and 'no ground truth' in out and 'RANDOM WEIGHTS' in out
    )
    run = load_run(tmp_path / 'run/dinov2_vits14')
    assert run.record['grid'] == [4, 6] and run.model.num_patches == 24
    assert 'ari_attn' not in json.loads((tmp_path / 'run/dinov2_vits14/result.json').read_text())


def test_train_on_a_folder_without_splits(tmp_path, capsys):
    "A part is held out by name, files that are not read are counted, and the masks of all images are written."
    rng, root = np.random.default_rng(0), tmp_path / 'photos'
    root.mkdir()
    for i in range(14):
        Image.fromarray(rng.integers(0, 255, (60 + i, 90, 3), np.uint8)).save(root / f'{i}.jpg')
    (root / 'list.txt').touch()
    sizes = '--backbone timm:test_vit --resolution 64x96 --grid_size native --slot_dim 32 --hidden_dim 32'
    sizes += ' --num_epochs 1 --warmup_epochs 0'
    args = f'train --preset version_0_1 --weights random --num_slots 4 --device cpu {sizes}'.split()
    args += ['--data_dir', root, '--save_dir', tmp_path / 'run']
    for _ in range(2):  # the same command again has nothing to do
        code, out, err = slotnb(capsys, *args)
        assert code == 0 and 'not read: 1 .txt' in out + err and 'are held out as test by name' in out + err
        assert 'slots per image after merging' in out
    run_dir = tmp_path / 'run/timm_test_vit'
    held_out = len(pd.read_csv(run_dir / 'test_scenes.csv'))
    assert 1 <= held_out < 14 and json.loads((run_dir / 'result.json').read_text())['train_scenes'] < 14 - held_out
    for i in range(14):
        assert Image.open(run_dir / f'masks/labels/{i}.png').size == (90, 60 + i)


def test_a_run_belongs_to_its_images(tmp_path, capsys):
    "Another dataset, or one more image, in the same save_dir is refused; a folder that has moved is the same data."
    rng = np.random.default_rng(0)
    for name in ('a', 'b'):
        for split, n in dict(train=10, test=2).items():
            (tmp_path / name / split).mkdir(parents=True)
            for i in range(n):
                Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)).save(tmp_path / name / split / f'{i}.png')
    sizes = '--resolution 56x84 --grid_size native --num_epochs 1 --warmup_epochs 0 --slot_dim 32 --hidden_dim 32'
    args = f'train --preset version_0_1 --weights random --num_slots 4 --device cpu {sizes}'.split()
    args += ['--save_dir', tmp_path / 'run', '--data_dir']
    result = tmp_path / 'run/dinov2_vits14/result.json'
    assert slotnb(capsys, *args, tmp_path / 'a')[0] == 0
    first = result.read_bytes()
    (tmp_path / 'a').rename(tmp_path / 'moved')
    assert slotnb(capsys, *args, tmp_path / 'moved')[0] == 0 and result.read_bytes() == first
    code, _, err = slotnb(capsys, *args, tmp_path / 'b')
    assert code == 2 and "images: those of the split 'train' have changed" in err and 'Traceback' not in err
    (tmp_path / 'moved/test/0.png').rename(tmp_path / 'moved/test/9.png')
    Image.fromarray(rng.integers(0, 255, (56, 84, 3), np.uint8)).save(tmp_path / 'moved/test/0.png')
    code, _, err = slotnb(capsys, *args, tmp_path / 'moved')
    assert code == 2 and "split 'test'" in err
    (tmp_path / 'moved').rename(tmp_path / 'a')
    with pytest.raises(SlotnbError, match='other images'):
        evaluate(result.parent, show_progress=False)
    assert result.read_bytes() == first


def test_heic(tmp_path, capsys):
    "HEIC is read with the extra, at the size and in the colors of the image."
    import pillow_heif

    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[:, 48:] = 200, 40, 40
    pillow_heif.from_pillow(Image.fromarray(pixels)).save(tmp_path / 'phone.heic', quality=95)
    Image.fromarray(pixels).save(tmp_path / 'other.avif', quality=95)
    code, out, err = slotnb(capsys, 'data', 'info', tmp_path, '--out', '')
    assert code == 0 and '96x64 (2)' in out, err
    for sample in open_dataset(tmp_path, progress=False):
        assert np.abs(sample.image.astype(int) - pixels).mean() < 6, sample.path


def test_scores_on_a_grid_that_is_not_square(tmp_path, few_scenes, capsys):
    code, out, _ = slotnb(
        capsys,
        'train',
        '--preset',
        'version_0_1',
        '--data_dir',
        few_scenes,
        '--weights',
        'random',
        '--resolution',
        '96x144',
        '--num_epochs',
        1,
        '--warmup_epochs',
        0,
        '--grid_size',
        '8x12',
        '--slot_dim',
        32,
        '--hidden_dim',
        32,
        '--num_slots',
        4,
        '--device',
        'cpu',
        '--save_dir',
        tmp_path / 'run',
        '--backbone',
        'timm:test_vit',
    )
    folder = tmp_path / 'run/timm_test_vit'
    assert code == 0 and 'FG-ARI' in out and pd.read_csv(folder / 'test_scenes.csv').fg_ari_refined.notna().all()
    assert load_run(folder).record['grid'] == [8, 12]


def test_card(tmp_path, few_scenes, capsys):
    code, out, _ = slotnb(
        capsys,
        'features',
        '--card',
        '--data_dir',
        few_scenes,
        '--weights',
        'random',
        '--backbone',
        'timm:test_vit',
        '--out',
        tmp_path,
    )
    made = tmp_path / 'timm_test_vit'
    assert code == 0 and 'RANDOM WEIGHTS' in out and str(made / 'feature_card.png') in out
    assert (
        json.loads((made / 'feature_card.json').read_text())['normalizers']['none']['kmeans_fg_ari'] > 0
        and Image.open(made / 'feature_card.png').size[0] > 500
    )


EXTENDED = '--backbone timm:test_vit --weights random --resolution 64 --num_slots 3 --slot_dim 16 --rounds 2'.split()
EXTENDED += '--warmup_epochs 0 --device cpu'.split()


def test_a_finished_run_goes_on(tmp_path, few_scenes, capsys, monkeypatch):
    "Without the flag the message says what to do; with it a new cosine follows, interrupted or not."
    args = ['train', *EXTENDED, '--data_dir', few_scenes]
    once, twice = ([*args, '--save_dir', tmp_path / name] for name in ('once', 'twice'))
    run_dir = tmp_path / 'once/timm_test_vit'
    code, _, err = slotnb(capsys, *once, '--num_epochs', 2, '--extend')
    assert code == 2 and 'no run to extend' in err
    for line in (once, twice):
        assert slotnb(capsys, *line, '--num_epochs', 2)[0] == 0
    before = (run_dir / 'metrics.csv').read_text()
    code, _, err = slotnb(capsys, *once, '--num_epochs', 4)
    assert code == 2 and '--extend trains it on to 4' in err and len(err.strip().splitlines()) == 1
    code, _, err = slotnb(capsys, *once, '--num_epochs', 4, '--lr', 0.1)
    assert code == 2 and 'other settings (lr' in err
    assert slotnb(capsys, *once, '--num_epochs', 4, '--extend')[0] == 0
    after = (run_dir / 'metrics.csv').read_text()
    assert after.startswith(before) and len(pd.read_csv(run_dir / 'metrics.csv')) == 4
    settings = json.loads((run_dir / 'config.json').read_text())['config']
    assert (settings['num_epochs'], settings['extended']) == (4, '2')
    earlier = json.loads((run_dir / 'round1/timm_test_vit/config.json').read_text())['config']
    assert (earlier['num_epochs'], earlier['extended']) == (2, '')
    config = TrainConfig(**settings)
    assert lr_at(1, 1, config) == lr_at(1, 1, replace(config, num_epochs=2, extended=''))
    assert lr_at(2, 1, config) == config.lr and 0 < lr_at(3, 1, config) < config.lr
    for more in ([], ['--extend']):  # the same command again has nothing to do
        assert slotnb(capsys, *once, '--num_epochs', 4, *more)[0] == 0
        assert (run_dir / 'metrics.csv').read_text() == after
    packed = load_run(pack([run_dir], tmp_path / 'model', frozen_backbone(config), 'Eight scenes.'))
    run = load_run(run_dir)
    assert packed.epoch == run.epoch and packed.model.state_dict().keys() == run.model.state_dict().keys()
    (run_dir / 'config.json').write_text('[]')
    code, _, err = slotnb(capsys, *once, '--num_epochs', 4)
    assert code == 2 and "is not a run's configuration" in err and len(err.strip().splitlines()) == 1

    def stop(self, *_):
        if self.epoch == 3:
            raise KeyboardInterrupt
        return end_epoch(self, *_)

    end_epoch = RunState.end_epoch
    monkeypatch.setattr(RunState, 'end_epoch', stop)
    assert slotnb(capsys, *twice, '--num_epochs', 4, '--extend')[0] == 130
    monkeypatch.undo()
    assert slotnb(capsys, *twice, '--num_epochs', 4, '--extend')[0] == 0
    assert (tmp_path / 'twice/timm_test_vit/metrics.csv').read_text() == after


def test_help_in_groups(capsys):
    "The common flags come first; every setting is a flag with a help text, and stands in one group."
    for command, last in dict(train='training', segment='data', features='data', render='pictures').items():
        with pytest.raises(SystemExit):
            main([command, '--help'])
        text = capsys.readouterr().out
        assert text.index(' common options ') < text.index(f' {last} options '), command
        if command == 'train':
            shown = re.findall(r'^\W{1,3}--(\w+)', text, re.M)
            assert sorted(shown) == sorted({f.name for f in fields(TrainConfig)} - {'extended'} | {'preset', 'extend'})


def test_completion_of_commands_and_flags(tmp_path, capsys):
    for shell in 'bash', 'zsh':
        code, script, _ = slotnb(capsys, '--print-completion', shell)
        assert code == 0 and 'slotnb' in script
        if shell == 'bash':
            (tmp_path / 'slotnb').write_text(script)
    for words, found in ((('slotnb', 'tr'), 'train'), (('slotnb', 'segment', '--resi'), '--resize')):
        line = f'COMP_WORDS=({" ".join(words)}); COMP_CWORD={len(words) - 1}; . {tmp_path}/slotnb; _tyro_slotnb'
        said = subprocess.run(['bash', '-c', f'{line}; echo "${{COMPREPLY[@]}}"'], capture_output=True, text=True)
        assert said.stdout.split() == [found], (words, said)
    code, _, err = slotnb(capsys, '--print-completion=fish')
    assert code == 2 and 'bash, zsh or tcsh' in err
