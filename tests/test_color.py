"The color of a patch beside its token: off it changes nothing, on it reaches everything that reads features."

import json
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from conftest import DATA
from slotnb.backbones import ViTBackbone
from slotnb.cli import main
from slotnb.core import SlotnbError
from slotnb.data import KubricFolders
from slotnb.evaluate import load_run
from slotnb.features import compute_features, feature_key
from slotnb.finer_grid import ShiftedBackbone
from slotnb.geometry import inside
from slotnb.runs.config import FeatureSettings, TrainConfig
from slotnb.runs.identity import check_same_run
from slotnb.tokens import join_colors, patch_colors, rgb_to_lab

SMALL = dict(name='timm:test_vit', weights='random', resolution=64, grid_size='native', device='cpu')
TRAIN = '--backbone timm:test_vit --weights random --resolution 64 --num_slots 3 --slot_dim 16 --rounds 1 --layer=-1'
TRAIN = f'{TRAIN} --num_epochs 1 --warmup_epochs 0 --batch_size 4 --space_dim 8 --device cpu'.split()


def rgb(*colors):
    "An image of vertical stripes, 64x64, (3 h w)."
    return torch.tensor(colors).T[:, None].repeat_interleave(64 // len(colors), 2).expand(3, 64, 64).contiguous()


def test_lab_of_known_colors():
    lab = rgb_to_lab(rgb((1.0, 0, 0), (0, 1.0, 0), (0, 0, 1.0), (1.0, 1, 1))[None])[0, :, 0, ::16].T
    known = [[53.24, 80.09, 67.20], [87.73, -86.18, 83.18], [32.30, 79.19, -107.86], [100, 0, 0]]
    torch.testing.assert_close(lab, torch.tensor(known), rtol=0, atol=0.05)


def test_without_color_nothing_changes():
    off, on = ViTBackbone(**SMALL, color=0), ViTBackbone(**SMALL, color=0.5)
    assert off.record == ViTBackbone(**SMALL).record and 'color' not in off.record
    assert on.record == off.record | dict(color=0.5, dim=off.dim + 3)
    data = KubricFolders(DATA, 'test')
    assert feature_key(off, data, False) != feature_key(on, data, False)


@pytest.mark.parametrize('layer', ['-1', '-1,-2'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_tokens_and_colors(layer, precision):
    x = torch.stack([rgb((1.0, 0, 0), (0, 0, 1.0)), torch.rand(3, 64, 64)])
    off, on = (ViTBackbone(**SMALL, layer=layer, precision=precision, color=c) for c in (0, 2))
    torch.testing.assert_close(on(x)[..., :-3], F.normalize(off(x), dim=-1))
    stripes = on(x)[0, :, -3:].view(4, 4, 3)
    torch.testing.assert_close(stripes[:, :2], (2 * rgb_to_lab(x)[0, :, 0, 0] / 100).expand(4, 2, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(on(x)[1, :, -3:], 2 * patch_colors(x[1:], 16)[0], rtol=0, atol=1e-4)
    as_bytes = (255 * x).round().to(torch.uint8)
    torch.testing.assert_close(on(as_bytes), on(as_bytes.float() / 255))


def test_colors_go_with_the_grid_the_border_and_the_shifts():
    wide, x = torch.rand(3, 20, 60), torch.rand(1, 3, 64, 64)
    kept = ViTBackbone(**SMALL, resize='letterbox', color=1)
    feats = compute_features(kept, [wide])[0]
    assert inside(feats).sum() == 4 and feats[inside(feats)].isfinite().all() and feats[0].isnan().all()
    coarse = ViTBackbone(**SMALL | dict(grid_size=2), color=1)(x)
    assert coarse.shape == (1, 4, ViTBackbone(**SMALL).dim + 3)
    net = ViTBackbone(**SMALL, color=1)
    fine, padded = ShiftedBackbone(net)(x), F.pad(x, (8,) * 4, mode='reflect')
    colors = fine[0, :, -3:].view(8, 8, 3)
    for i in (0, 1):
        moved = padded[..., 4 + 8 * i : 68 + 8 * i, 4 + 8 * i : 68 + 8 * i]
        expected = patch_colors(moved, 16)[0].view(4, 4, 3)
        torch.testing.assert_close(colors[i::2, i::2], expected, rtol=0, atol=1e-4)


def test_colors_of_a_class_of_the_users_own(tmp_path, monkeypatch):
    source = 'class Ones(torch.nn.Module):\n    patch_size, dim = 16, 4\n    def forward(self, x):\n'
    source = f'import torch\n{source}        return torch.ones(len(x), x[0, 0].numel() // 256, 4)\n'
    (tmp_path / 'ones_color.py').write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    x = torch.rand(2, 3, 64, 64)
    net = ViTBackbone('ones_color:Ones', resolution=64, grid_size='native', device='cpu', color=3)
    torch.testing.assert_close(net(x), join_colors(torch.ones(2, 16, 4), x, 16, 3), rtol=0, atol=1e-4)
    (tmp_path / 'sevens_color.py').write_text(source.replace('256, 4)', '256, 7)'))  # 4 and 3 colors are 7 too
    with pytest.raises(SlotnbError, match=r'expected \(2, 16, 4\)'):
        ViTBackbone('sevens_color:Ones', resolution=64, grid_size='native', device='cpu', color=3)(x)


@pytest.mark.parametrize('color', [-1.0, float('nan'), float('inf')])
def test_wrong_weights(color):
    with pytest.raises(SlotnbError, match='0 or more'):
        ViTBackbone(**SMALL, color=color)
    with pytest.raises(SlotnbError, match='0 or more'):
        TrainConfig(color=color)
    assert FeatureSettings(color=2).backbone_args['color'] == 2.0


def test_a_run_with_colors(tmp_path, capsys):
    for split, numbers in dict(train=range(8), test=range(2)).items():
        (tmp_path / 'data' / split).mkdir(parents=True)
        for i in numbers:
            Image.fromarray(KubricFolders(DATA, split)[i].image).save(tmp_path / f'data/{split}/{i}.png')
    args = ['train', *TRAIN, '--data_dir', str(tmp_path / 'data'), '--save_dir', str(tmp_path)]
    assert main([*args, '--color', '-1']) == 2 and 'color -1.0 must be 0 or more' in capsys.readouterr().err
    assert main([*args, '--color', '2']) == 0
    run_dir = tmp_path / 'timm_test_vit'
    about = json.loads((run_dir / 'config.json').read_text())
    assert about['config']['color'] == about['backbone']['color'] == 2.0
    run, image = load_run(run_dir), tmp_path / 'data/test/0.png'
    assert len(run.normalizer.mean) == about['backbone']['dim'] == 67
    whole = run.segment(image, device='cpu')
    assert whole.masks.shape == (3, 4, 4) and run.segment(image, shifts=2, device='cpu').masks.shape == (3, 8, 8)
    letterbox = run.segment(torch.rand(20, 60, 3), resize='letterbox', device='cpu')
    assert letterbox.masks.isfinite().all()
    capsys.readouterr()
    assert main(args) == 2 and "(color 2.0 there, 0.0 here)" in capsys.readouterr().err


def test_a_run_from_before_there_were_colors(tmp_path):
    path, config = tmp_path / 'config.json', dict(vars(TrainConfig()))
    old = {k: v for k, v in config.items() if k != 'color'}
    path.write_text(json.dumps(dict(config=old, backbone={})))
    assert check_same_run(path, config=config)
    with pytest.raises(SlotnbError, match='color 0.0 there, 1.0 here'):
        check_same_run(path, config=config | dict(color=1.0))
