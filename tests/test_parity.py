"""Parity: small networks with random weights, written to disk under the names that their authors gave, read through
the public ViTBackbone, equal tests/originals.py at each block, with the final norm and without, square and not,
tokens, queries, keys and values."""

import pytest
import safetensors.torch
import torch
import originals as O
from slotnb import backbones as B
from slotnb.backbone_specs import BackboneSpec, read_spec
from slotnb.backbones import ViTBackbone
from slotnb.core import SlotnbError
from slotnb.layouts import layout
from slotnb.weights import read_state

DIM, DEPTH, PATCH, SIDE, HEADS = 32, 3, 4, 7, 2
TIMM = dict(embed_dim=DIM, depth=DEPTH, num_heads=HEADS, patch_size=PATCH, img_size=PATCH * SIDE)
CLIP = dict(width=DIM, layers=DEPTH, head_width=DIM // HEADS, patch_size=PATCH, image_size=PATCH * SIDE)
META, ANTI = dict(pos_offset=0.1, pos_antialias=False), dict(pos_offset=0.0, pos_antialias=True)
IMAGENET = B.IMAGENET
SIZES = ['spec', (PATCH * 5, PATCH * 9), (PATCH * 12, PATCH * 12)]  # native, not square, larger


def spec(name, source, arch, kwargs, **kw):
    return read_spec(
        BackboneSpec(name, source, arch, '', 'model.safetensors', 0, 0, 0, **IMAGENET, arch_kwargs=kwargs, **kw)
    )


FAMILIES = {  # name: spec, weights in their authors' layout, the original
    'dino': (lambda n: spec(n, 'timm', 'vit_small_patch16_224', TIMM, **META), lambda: O.meta_weights(), O.dino),
    'dinov2': (
        lambda n: spec(n, 'timm', 'vit_small_patch14_dinov2', TIMM, **META),
        lambda: O.meta_weights(scale=True),
        O.dino,
    ),
    'dinov2_reg': (
        lambda n: spec(n, 'timm', 'vit_small_patch14_reg4_dinov2', TIMM, **ANTI),
        lambda: O.meta_weights(scale=True, registers=4),
        lambda *a: O.dino(*a, offset=0.0, antialias=True),
    ),
    'dinov2_giant': (
        lambda n: spec(n, 'timm', 'vit_giant_patch14_dinov2', TIMM | dict(mlp_ratio=4.0), **META),
        lambda: O.meta_weights(scale=True, swiglu=2 * DIM),
        O.dino,
    ),
    'hf_vit': (lambda n: spec(n, 'timm', 'vit_small_patch16_224', TIMM, **META), lambda: O.hf_weights(), O.hf_vit),
    'hf_dinov2': (
        lambda n: spec(n, 'timm', 'vit_small_patch14_dinov2', TIMM, **META),
        lambda: O.hf_weights(scale=True),
        O.hf_vit,
    ),
    'hf_dinov2_reg': (
        lambda n: spec(n, 'timm', 'vit_small_patch14_reg4_dinov2', TIMM, **ANTI),
        lambda: O.hf_weights(scale=True, registers=4),
        lambda *a: O.hf_vit(*a, offset=0.0, antialias=True),
    ),
    'openai_clip': (
        lambda n: spec(n, 'open_clip', 'ViT-B-16', CLIP, quick_gelu=True),
        lambda: O.clip_weights(),
        O.clip,
    ),
    'open_clip': (
        lambda n: spec(n, 'open_clip', 'ViT-B-16', CLIP),
        lambda: O.clip_weights(),
        lambda *a: O.clip(*a, act=torch.nn.functional.gelu),
    ),
    'hf_clip': (
        lambda n: spec(n, 'open_clip', 'ViT-B-16', CLIP, quick_gelu=True),
        lambda: O.hf_clip_weights(),
        O.hf_clip,
    ),
    'openai_clip_in_timm': (
        lambda n: spec(n, 'timm', 'vit_base_patch16_clip_quickgelu_224', TIMM),
        lambda: O.clip_weights(),
        O.clip,
    ),
    'hf_clip_in_timm': (
        lambda n: spec(n, 'timm', 'vit_base_patch16_clip_quickgelu_224', TIMM),
        lambda: O.hf_clip_weights(),
        O.hf_clip,
    ),
    'siglip': (lambda n: spec(n, 'timm', 'vit_base_patch16_siglip_224', TIMM), lambda: O.siglip_weights(), O.siglip),
    'dinov3': (lambda n: spec(n, 'timm', 'vit_small_patch16_dinov3', TIMM), lambda: O.dinov3_weights(), O.dinov3),
    'dinov3_qkvb': (
        lambda n: spec(n, 'timm', 'vit_small_patch16_dinov3_qkvb', TIMM),
        lambda: O.dinov3_weights(),
        O.dinov3,
    ),
}


@pytest.fixture(autouse=True)
def one_thread():  # these networks are smaller than the cost of sharing them out
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch, tmp_path):
    "A small backbone of each family under a name of its own, its file, and its original."
    make, weights, original = FAMILIES[request.param]
    name = f'small_{request.param}'
    w = weights()
    if request.param == 'dinov3':
        w = {
            k: torch.zeros_like(v) if k.endswith('qkv.bias') else v for k, v in w.items()
        }  # of S, B, L and H+ they are zero
    monkeypatch.setitem(B.BACKBONES, name, make(name))
    safetensors.torch.save_file({k: v.contiguous() for k, v in w.items()}, tmp_path / 'original.safetensors')
    return name, str(tmp_path / 'original.safetensors'), w, original


def images(size, seed=0):
    return torch.rand(
        2, 3, *((PATCH * SIDE,) * 2 if size == 'spec' else size), generator=torch.Generator().manual_seed(seed)
    )


def normalised(x):
    mean, std = (torch.tensor(IMAGENET[k])[:, None, None] for k in ('mean', 'std'))
    return (x - mean) / std


def same(ours, theirs):  # 1e-5 of what the features measure
    assert ours.shape == theirs.shape and ours.dtype == torch.float32
    assert theirs.std() > 0.1
    error = (ours - theirs).abs().max() / max(1.0, theirs.std().item())
    assert error < 1e-5, f'off by {error:.1e}'


@pytest.mark.parametrize('size', SIZES, ids=str)
def test_tokens(family, size):
    name, path, w, original = family
    x, net = images(size), ViTBackbone(name, path, resolution=size).net
    for layer in (*range(DEPTH), -DEPTH):
        for final_norm in (False, True):
            b = ViTBackbone(name, path, layer, final_norm, size)
            vars(b)['net'] = net  # the network is the same for all of these
            same(b(x), original(w, normalised(x), HEADS, layer % DEPTH, final_norm))
            assert b.grid == tuple(s // PATCH for s in x.shape[-2:]) and b.dim == DIM


@pytest.mark.parametrize('size', SIZES[:2], ids=str)
def test_facets(family, size):
    name, path, w, original = family
    x, net = images(size), ViTBackbone(name, path, resolution=size).net
    for facet in ('query', 'key', 'value'):
        for layer in (0, -1):
            b = ViTBackbone(name, path, layer, True, size, facet=facet)
            vars(b)['net'] = net
            same(b(x), original(w, normalised(x), HEADS, layer % DEPTH, False, facet))
            assert b.record['final_norm'] is False and b.record['facet'] == facet and b.dim == DIM


def test_every_part_would_show(family):
    """The references are no fair-weather ones: change any one weight tensor a little and they part by far more than
    the bound."""
    name, path, w, original = family
    x, blind = (
        normalised(images('spec')),
        ('mask_token', 'pool', 'visual.proj', 'visual_projection', 'periods', 'key.bias', 'k_proj.bias'),
    )  # softmax does not see a key's bias
    want, clip = original(w, x, HEADS, DEPTH - 1, True), 'clip' in name
    for k, v in w.items():
        if (
            any(b in k for b in blind)
            or not v.is_floating_point()
            or clip
            and not k.startswith(('visual.', 'vision_model.'))
        ):
            continue
        got = original(w | {k: v + 0.1 * O.Draw(1)(*v.shape)}, x, HEADS, DEPTH - 1, True)
        assert (got - want).abs().max() > 1e-3, k


# -- what training and saving put around them


def wrap_dino_checkpoint(w):
    import argparse

    teacher = {f'backbone.{k}': v for k, v in w.items()} | {
        'head.mlp.0.weight': torch.zeros(4, DIM),
        'head.last_layer.weight_v': torch.zeros(4, 4),
    }
    return dict(
        student={f'module.{k}': v + 1 for k, v in teacher.items()},
        teacher=teacher,
        optimizer=dict(state={}),
        epoch=100,
        args=argparse.Namespace(arch='vit_small', lr=0.0005),
        dino_loss={'center': torch.zeros(1, 4)},
    )


def wrap_dinov2_teacher(w):
    chunk = lambda k: (
        k.replace(f'blocks.{k.split(".")[1]}.', f'blocks.{int(k.split(".")[1]) // 2}.{k.split(".")[1]}.')
        if k.startswith('blocks.')
        else k
    )
    return dict(
        teacher={f'backbone.{chunk(k)}': v for k, v in w.items()} | {'dino_head.mlp.0.weight': torch.zeros(4, DIM)}
    )


def wrap_ssl_meta_arch(w):
    return dict(
        model={f'{who}.backbone.{k}': v + (who == 'student') for who in ('student', 'teacher') for k, v in w.items()},
        iteration=1,
    )


def wrap_ddp(w):
    return dict(state_dict={f'module.{k}': v for k, v in w.items()})


def wrap_dinov2_head(w):
    return {f'dinov2.{k}': v for k, v in w.items()} | {
        'classifier.weight': torch.zeros(3, DIM),
        'classifier.bias': torch.zeros(3),
    }


def wrap_vit_head(w):
    return {f'vit.{k}': v for k, v in w.items()} | {'classifier.weight': torch.zeros(3, DIM)}


@pytest.mark.parametrize(
    'kind, wrap',
    [
        ('dino', wrap_dino_checkpoint),
        ('dino', wrap_ddp),
        ('dinov2', wrap_dinov2_teacher),
        ('dinov2', wrap_ssl_meta_arch),
        ('dinov2_reg', wrap_dinov2_teacher),
        ('hf_dinov2', wrap_dinov2_head),
        ('hf_vit', wrap_vit_head),
        ('openai_clip', wrap_ddp),
    ],
)
def test_wrapped(kind, wrap, tmp_path, monkeypatch):
    suffix = 'pth'
    make, weights, original = FAMILIES[kind]
    w = weights()
    monkeypatch.setitem(B.BACKBONES, 'small', make('small'))
    torch.save(wrap(w), tmp_path / f'x.{suffix}')
    x = images(SIZES[1])
    same(
        ViTBackbone('small', str(tmp_path / f'x.{suffix}'), resolution=SIZES[1])(x),
        original(w, normalised(x), HEADS, DEPTH - 1, True),
    )


@pytest.mark.parametrize(
    'kind, rename',
    [
        ('hf_vit', O.in_memory),
        ('hf_dinov2', O.in_memory),
        ('hf_dinov2_reg', O.in_memory),
        ('dinov3_qkvb', O.hf_dinov3),
        ('dinov3_qkvb', lambda w: O.replaced(O.hf_dinov3(w), ('layer.', 'model.layer.'))),
        (
            'hf_clip',
            lambda w: {k.removeprefix('vision_model.'): v for k, v in w.items() if k.startswith('vision_model.')},
        ),
    ],
    ids=['vit 5', 'dinov2 5', 'dinov2_reg 5', 'dinov3 hf', 'dinov3 hf 5', 'clip 5'],
)
def test_other_names_of_hugging_face(kind, rename, tmp_path, monkeypatch):
    "transformers 5 keeps other names in memory than in its files; DINOv3 has its own."
    make, weights, original = FAMILIES[kind]
    w = weights()
    monkeypatch.setitem(B.BACKBONES, 'small', make('small'))
    torch.save(rename(w), tmp_path / 'x.bin')
    x = images(SIZES[1])
    same(
        ViTBackbone('small', str(tmp_path / 'x.bin'), resolution=SIZES[1])(x),
        original(w, normalised(x), HEADS, DEPTH - 1, True),
    )


def test_trunk_of_open_clip(tmp_path, monkeypatch):
    "SigLIP in open_clip wraps a network of timm: its file has `visual.trunk.`, and the trunk's tokens are asked."
    monkeypatch.setitem(
        B.BACKBONES,
        'small',
        spec('small', 'open_clip', 'ViT-B-16-SigLIP2', dict(timm_model_name='test_vit', timm_pool='token')),
    )
    import timm

    torch.manual_seed(0)
    net = timm.create_model('test_vit', num_classes=0, img_size=(96, 160)).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    state = {f'visual.trunk.{k}': v for k, v in net.state_dict().items()} | {
        'visual.trunk.head.weight': torch.zeros(8, 64),
        'logit_bias': torch.zeros(1),
    }
    safetensors.torch.save_file(state, tmp_path / 'x.safetensors')
    b = ViTBackbone('small', str(tmp_path / 'x.safetensors'), resolution=(96, 160))
    x = torch.rand(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    want = net.forward_features(normalised(x))[:, net.num_prefix_tokens :].detach()
    same(b(x), want)
    assert b.grid == (6, 10)


def test_quick_gelu_is_not_gelu(tmp_path, monkeypatch):
    "The trap: the same file fits the network with the other activation, and the features are others."
    w, x = O.clip_weights(), images('spec')
    safetensors.torch.save_file(w, tmp_path / 'x.safetensors')
    out = []
    for quick in (False, True):
        monkeypatch.setitem(B.BACKBONES, 'small', spec('small', 'open_clip', 'ViT-B-16', CLIP, quick_gelu=quick))
        out.append(ViTBackbone('small', str(tmp_path / 'x.safetensors'))(x))
    assert (out[0] - out[1]).abs().max() > 1e-2


# -- what does not fit is named, and nothing loads half


def breaks(change, *words, kind='dinov2', tmp_path=None, monkeypatch=None):
    make, weights, _ = FAMILIES[kind]
    monkeypatch.setitem(B.BACKBONES, 'small', make('small'))
    torch.save(change(weights()), tmp_path / 'x.pth')
    b = ViTBackbone('small', str(tmp_path / 'x.pth'))
    with pytest.raises(SlotnbError) as e:
        b.net
    assert all(word in str(e.value) for word in ('x.pth', *words)), e.value


@pytest.mark.parametrize(
    'change, words',
    [
        (
            lambda w: {k: v for k, v in w.items() if k != 'blocks.1.ls2.gamma'},
            ("'blocks.1.ls2.gamma' (32,) is missing", 'nothing was loaded'),
        ),
        (lambda w: w | {'blocks.3.norm1.bias': torch.zeros(32)}, ("'blocks.3.norm1.bias' (32,) has no place",)),
        (lambda w: w | {'norm.bias': torch.zeros(48)}, ("'norm.bias' has shape (48,) and the network expects (32,)",)),
        (lambda w: w | {'patch_embed.proj.weight': torch.zeros(32, 3, 8, 8)}, ('(32, 3, 8, 8)', '(32, 3, 4, 4)')),
        (lambda w: w | {'pos_embed': torch.zeros(1, 51, 32)}, ('(1, 51, 32)', '(1, 50, 32)')),
        (lambda w: O.clip_weights(), ('CLIP', 'do not fit')),
        (lambda w: {}, ('hold no tensors',)),
        (lambda w: [1, 2], ('hold no tensors',)),
    ],
    ids=['missing', 'extra', 'shape', 'patch', 'position', 'clip', 'empty', 'list'],
)
def test_misfit(change, words, tmp_path, monkeypatch):
    breaks(change, *words, tmp_path=tmp_path, monkeypatch=monkeypatch)


def test_hf_file_without_one_bias(tmp_path, monkeypatch):
    "A bias that is missing is not taken for zero where its sisters' layers have one."
    gone = 'encoder.layer.1.attention.attention.key.bias'
    breaks(
        lambda w: {k: v for k, v in w.items() if k != gone},
        'attn.qkv',
        kind='hf_dinov2',
        tmp_path=tmp_path,
        monkeypatch=monkeypatch,
    )


def test_torchscript_and_pickles_are_refused(tmp_path, monkeypatch):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'clip.pt')
    with pytest.raises(SlotnbError, match='TorchScript.*convert it once'):
        read_state(tmp_path / 'clip.pt')
    torch.save(torch.nn.Linear(2, 2), tmp_path / 'whole.pth')
    with pytest.raises(SlotnbError, match='never unpickled'):
        read_state(tmp_path / 'whole.pth')
    (tmp_path / 'cut.safetensors').write_bytes(b'\x08')
    with pytest.raises(SlotnbError, match='cut.safetensors cannot be read'):
        read_state(tmp_path / 'cut.safetensors')


@pytest.mark.parametrize(
    'kind, name',
    [
        ('dino', 'timm'),
        ('dinov2', 'DINOv2'),
        ('dinov2_reg', 'DINOv2'),
        ('hf_vit', 'Hugging Face ViT'),
        ('openai_clip', 'CLIP'),
        ('hf_dinov2', 'Hugging Face Dinov2'),
        ('hf_dinov2_reg', 'Hugging Face Dinov2'),
        ('hf_clip', 'Hugging Face CLIP'),
        ('dinov3', 'DINOv3'),
    ],
)
def test_layout(kind, name):
    assert layout(FAMILIES[kind][1]()) == name
