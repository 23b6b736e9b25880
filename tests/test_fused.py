"The fused blocks: near fp32 for every plain network, layer and facet, and refused or left to the library elsewhere."

import pytest, torch, torch.nn.functional as F
import slotnb.backbones as B, slotnb.fused as fused
from slotnb.backbones import ViTBackbone
from slotnb.core import SlotnbError
from slotnb.fused import FusedBlocks, fused_obstacle, rotation

here = fused._library()
needs_kernel = pytest.mark.skipif(isinstance(here, str), reason=str(here))


@pytest.fixture(autouse=True)
def no_matrix_units(monkeypatch):
    "With them torch's own products are taken for bf16; here the kernel is asked, whatever the processor."
    monkeypatch.setattr(B, 'has_matrix_units', lambda: False)


def images(h, w, n=2):
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(0))


def rel(got, want):
    return ((got - want).norm() / want.norm()).item()


def stir(net):
    "Random weights that matter: biases, norms and layer scale far from 0 and 1, and a channel that stands out, as in trained networks."
    draw = torch.Generator().manual_seed(1)
    for name, p in net.named_parameters():
        noise = torch.randn(p.shape, generator=draw)
        if p.ndim > 1 and 'pos_embed' not in name and 'positional' not in name:
            p.data = noise * p.shape[-1] ** -0.5 if p.ndim == 2 else p.data
        elif p.ndim == 1:
            p.data = noise * 0.3 + (0 if 'bias' in name else 1)
    return net


def pair(name, precision, **kw):
    sides = [ViTBackbone(name, 'random', precision=p, **kw) for p in ('fp32', precision)]
    for s in sides:
        stir(s.net)
    assert sides[1].fused and not sides[0].fused
    return sides


PLAIN = [
    'timm:test_vit',
    'timm:vit_tiny_patch16_224',
    'timm:vit_small_patch14_reg4_dinov2',
    'timm:deit_tiny_distilled_patch16_224',
    'open_clip:ViT-B-32/openai',
    'open_clip:ViT-B-32/laion2b_s34b_b79k',
]


@needs_kernel
@pytest.mark.parametrize('precision, bound', [('bf16', 0.008), ('int8', 0.02)])
@pytest.mark.parametrize('name', PLAIN)
def test_near_fp32(name, precision, bound):
    "Class and register tokens, GELU and QuickGELU, layer scale or none, two widths of a head, an image that is not square."
    p = B.backbone_spec(name).patch_size
    exact, fast = pair(name, precision, resolution=(3 * p, 5 * p), grid_size='native')
    x = images(3 * p, 5 * p)
    want, got = exact(x), fast(x)
    assert got.shape == want.shape and got.dtype == torch.float32
    assert 1e-4 < rel(got, want) < bound
    torch.testing.assert_close(
        fast(x[1:]), got[1:], rtol=0, atol=1e-4
    )  # of the batch nothing is seen, but by fp32's own patch embedding


@needs_kernel
@pytest.mark.parametrize('layer', [0, 2, 5])
@pytest.mark.parametrize(
    'kw',
    [dict(final_norm=True), dict(final_norm=False), dict(facet='query'), dict(facet='key'), dict(facet='value')],
    ids=str,
)
@pytest.mark.parametrize('name', ['timm:test_vit', 'open_clip:ViT-B-32/openai'])
def test_layers_and_facets(name, kw, layer):
    size = dict(resolution=96)
    exact, fast = pair(name, 'bf16', layer=layer, grid_size='native', **size, **kw)
    error = rel(fast(images(96, 96)), exact(images(96, 96)))
    assert error < (1e-6 if 'facet' in kw and layer == 0 else 0.008)  # before the first block nothing is rounded


@needs_kernel
@pytest.mark.parametrize('tokens', [1, 2, 5, 6, 7, 15, 16, 17, 63, 64, 65, 200])
def test_any_number_of_tokens(tokens):
    "Tiles are of 6 rows, panels of 64 columns; what does not fill them must not show."
    blocks = stir(B._build(B.backbone_spec('timm:test_vit'))).eval().blocks
    x = torch.randn(3, tokens, 64, generator=torch.Generator().manual_seed(0))
    want = blocks(x).detach()
    for i in range(3):
        assert rel(FusedBlocks(blocks)(x)[i], want[i]) < 0.008
    assert rel(FusedBlocks(blocks, fused.INT8)(x), want) < 0.03


@needs_kernel
def test_tokens_do_not_see_each_others_place():
    "Without positions, permuted tokens give permuted results, up to the order of sums."
    blocks = stir(B._build(B.backbone_spec('timm:test_vit'))).eval().blocks
    x, order = torch.randn(1, 77, 64), torch.randperm(77)
    assert rel(FusedBlocks(blocks)(x[:, order]), FusedBlocks(blocks)(x)[:, order]) < 2e-3


@needs_kernel
def test_threads_do_not_matter():
    blocks, before = B._build(B.backbone_spec('timm:test_vit')).eval().blocks, torch.get_num_threads()
    x, run = torch.randn(5, 30, 64), FusedBlocks(blocks, fused.INT8, rotate=False)
    try:
        torch.set_num_threads(1)
        one = run(x)
        torch.set_num_threads(2)
        two = run(x)
    finally:
        torch.set_num_threads(before)
    assert one.equal(two) and not x.equal(one)  # nor is the input written to


@needs_kernel
def test_large_scores_and_values():
    "Softmax takes off its maximum, GELU reaches its ends: no worse than torch's own bf16 of the same blocks, over ten draws of weights."
    errors, x = [], torch.randn(2, 40, 64, generator=torch.Generator().manual_seed(0))
    for seed in range(10):
        torch.manual_seed(seed)
        block = B._build(B.backbone_spec('timm:test_vit')).eval().blocks[:1]
        block[0].attn.qkv.weight.data *= 40
        block[0].mlp.fc1.weight.data *= 100
        want = block(x).detach()
        errors.append([rel(FusedBlocks(block)(x), want), rel(block.bfloat16()(x.bfloat16()).detach().float(), want)])
    ours, torchs = torch.tensor(errors).mean(0)
    assert ours <= torchs, errors


def test_rotation_is_unseen():
    "Orthonormal, and the ones stay where they are: LayerNorm commutes with it."
    q = rotation(96)
    torch.testing.assert_close(q.T @ q, torch.eye(96).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.ones(96).double() @ q, torch.ones(96).double(), rtol=0, atol=1e-12)
    x = torch.randn(4, 96).double()
    torch.testing.assert_close(F.layer_norm(x @ q, (96,)), F.layer_norm(x, (96,)) @ q, rtol=0, atol=1e-10)


@needs_kernel
@pytest.mark.parametrize(
    'name, why',
    [('timm:vit_small_patch16_dinov3', 'EvaBlock'), ('timm:vit_pwee_patch16_reg1_gap_256', 'ParallelScalingBlock')],
)
def test_others_are_left_to_the_library(name, why):
    "bf16 is autocast's there, and the record says so; int8 is refused."
    b = ViTBackbone(name, 'random', precision='bf16')
    assert (b.fused, b.record['precision']) == (False, 'bf16')
    with pytest.raises(SlotnbError, match=f"precision 'int8' cannot be had of {name}: .*{why}.*; use 'bf16' or 'fp32'"):
        ViTBackbone(name, 'random', precision='int8')


@needs_kernel
@pytest.mark.parametrize(
    'kw, why',
    [
        (dict(qk_norm=True), 'no plain block'),
        (dict(scale_mlp_norm=True), 'no plain block'),
        (dict(act_layer='silu'), 'SiLU'),
        (dict(norm_layer=torch.nn.RMSNorm), 'LayerNorm'),
        (dict(num_heads=8), 'multiples of 16'),
        (dict(pre_norm=True), ''),
        (dict(qkv_bias=False), ''),
        (dict(proj_bias=False), ''),
    ],
    ids=str,
)
def test_parts_are_asked(kw, why):
    "One part that the kernel does not know is enough."
    import timm

    net = timm.create_model('test_vit', num_classes=0, **kw).eval()
    assert (why in fused_obstacle(net.blocks)) if why else not fused_obstacle(net.blocks)
    x = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0))
    if why:
        with pytest.raises(SlotnbError, match='fused blocks cannot be had'):
            FusedBlocks(net.blocks)
    else:
        assert rel(FusedBlocks(net.blocks)(x), net.blocks(x).detach()) < 0.008


def test_record_and_fallback(monkeypatch):
    "Without the kernel the precision is called what it was before, and gives what it gave."
    plain = ViTBackbone('timm:test_vit', 'random')
    assert plain.record['precision'] == 'fp32' and not plain.fused
    if not isinstance(here, str):
        assert [ViTBackbone('timm:test_vit', 'random', precision=p).record['precision'] for p in ('bf16', 'int8')] == [
            'bf16 fused',
            'int8 fused',
        ]
    monkeypatch.setattr(fused, '_library', lambda: 'there is no C++ compiler (g++ or clang++)')
    b, x = ViTBackbone('timm:test_vit', 'random', precision='bf16'), images(160, 160)
    assert b.record['precision'] == 'bf16'
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        want = plain.net.forward_features(plain.preprocess(x))[:, plain.spec.prefix_tokens :].float()
    assert b(x).equal(want)
    with pytest.raises(SlotnbError, match='no C\\+\\+ compiler'):
        ViTBackbone('timm:test_vit', 'random', precision='int8')


@pytest.mark.parametrize('compiler, said', [('none-such', 'no C\\+\\+ compiler'), ('false', 'does not compile')])
def test_what_cannot_be_compiled_is_said(compiler, said, tmp_path, monkeypatch):
    if not torch.cpu._is_avx512_bf16_supported():
        pytest.skip('no AVX-512 for bfloat16')
    import shutil

    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path))
    monkeypatch.setenv('CXX', compiler)
    which = shutil.which
    monkeypatch.setattr(shutil, 'which', lambda c: None if c == 'clang++' else which(c))
    fused._library.cache_clear()
    try:
        assert __import__('re').search(said, fused_obstacle([]))
    finally:
        fused._library.cache_clear()
    assert not list(tmp_path.rglob('*.so'))


@needs_kernel
def test_real_dinov2_stays_below_one_percent():
    from slotnb.data import KubricFolders
    from conftest import DATA

    x = torch.stack([torch.tensor(s.image).permute(2, 0, 1) for s in list(KubricFolders(DATA, 'test'))[::6]])
    exact, bf16, int8 = (ViTBackbone('dinov2_vits14', precision=p)(x) for p in ('fp32', 'bf16', 'int8'))
    assert rel(bf16, exact) < 0.006 and rel(int8, exact) < 0.01


def test_matrix_units_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(B, 'has_matrix_units', lambda: True)
    b, x = ViTBackbone('timm:test_vit', 'random', precision='bf16'), images(160, 160)
    assert b.record['precision'] == 'bf16' and b.net.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    exact = ViTBackbone('timm:test_vit', 'random')
    assert exact.net.blocks[0].attn.qkv.weight.dtype == torch.float32 and 1e-4 < rel(b(x), exact(x)) < 0.01
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        want = exact.net.forward_features(exact.preprocess(x))[:, exact.spec.prefix_tokens :].float()
    assert b(x).equal(want)  # autocast's digits, without a cast of all weights every time


@pytest.mark.parametrize('name', ['open_clip:ViT-B-32/openai', 'clip_vitb16'])
@pytest.mark.parametrize('facet', ['token', 'key'])
def test_torchs_bf16_of_open_clip(name, facet, monkeypatch):
    monkeypatch.setattr(B, 'has_matrix_units', lambda: True)
    exact, b = (ViTBackbone(name, 'random', precision=p, facet=facet, resolution=96) for p in ('fp32', 'bf16'))
    assert not b.fused and rel(b(images(96, 96)), exact(images(96, 96))) < 0.02
