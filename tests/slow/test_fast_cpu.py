"Compiled CPU kernels: outputs and gradients of the plain modules for all shapes, threads, registers; refusals; build."

import copy
import os
import stat
import subprocess
import sys
from pathlib import Path
import pytest
import torch
from conftest import saved_bytes
from slotnb.core import SlotnbError
from slotnb.decoder import AttentionDecoder, MLPDecoder
from slotnb.fast import cpu
from slotnb.losses import feature_mse
from slotnb.slot_attention import SlotAttention

ROUNDING = ('norm_slots.bias', 'to_alpha.bias')  # the softmax over slots cancels them: their gradients are rounding
why = cpu.why_unsupported(SlotAttention(64), torch.zeros(1, 1, 64))
pytestmark = pytest.mark.skipif(bool(why), reason=why)


def shaken(module, noise=0.1):
    "No parameter is where it starts: LayerNorms and biases count too."
    for p in module.parameters():
        p.data += noise * torch.randn_like(p)
    return module


def attention_case(b, k, n, d, h, iters=3, temperature=1.0):
    return shaken(SlotAttention(d, iters, h, temperature)), torch.randn(b, n, d), torch.randn(b, k, d)


def mixture_case(b, k, n, d, temperature=0.5):
    decoder = shaken(AttentionDecoder(16, d, 32, temperature))
    return decoder, torch.randn(b, k, 16), 3 * torch.randn(b, k, n), torch.randn(b, n, d)


def mlp_case(b, k, n, h, d, noise=0.05):
    return shaken(MLPDecoder(48, d, n, h, 0.5), noise), torch.randn(b, k, 48), torch.randn(b, n, d)


def run(loss, module, *inputs, upstream=1.0):
    "The loss, its gradients for the inputs that have one, and by name for the parameters."
    inputs = [t.clone().requires_grad_() for t in inputs]
    module.zero_grad()
    out = loss(module, *inputs)
    (upstream * out).backward()
    found = {'loss': out.detach()} | {f'input {i}': t.grad for i, t in enumerate(inputs)}
    return found | {name: p.grad.clone() for name, p in module.named_parameters()}


def double(loss, module, *inputs, **kwargs):
    return run(loss, copy.deepcopy(module).double(), *(t.double() for t in inputs), **kwargs)


def weighted(out):
    "A loss of slots, attn and logits whose gradients are all different."
    return sum((t * torch.linspace(-1, 1, t.numel(), dtype=t.dtype).view_as(t)).square().sum() for t in out)


def attention_losses(of=weighted):
    return lambda m, x, s: of(cpu.slot_attention(m, x, s)), lambda m, x, s: of(m(x, s))


def mixture_losses(target):
    def plain(decoder, slots, logits):
        return feature_mse(decoder(slots, logits).recon, target.to(slots.dtype))

    return lambda *a: cpu.attention_decoder_mse(*a, target), plain


def mlp_losses(target, rows=None):
    def plain(decoder, slots):
        return feature_mse(decoder(slots).recon, target.to(slots.dtype))

    return lambda *a: cpu.mlp_decoder_mse(*a, target, rows), plain


def assert_exact(losses, module, *inputs, upstream=1.0, floor=2e-6):
    "About as near to double precision as autograd in single precision is."
    kernel, plain = losses
    want = double(plain, module, *inputs, upstream=upstream)
    got, single = (run(f, module, *inputs, upstream=upstream) for f in (kernel, plain))
    for name, x in want.items():
        gap, allowed = ((y[name].double() - x).norm() for y in (got, single))
        assert got[name].dtype == torch.float32 and got[name].is_contiguous()
        if name.endswith(ROUNDING):
            assert gap < 1e-4 * upstream * max(1, x.numel())
        else:  # a single slot, or a single patch, has gradients that are nothing but rounding
            assert gap < 4 * allowed + floor * x.norm() + 1e-7 * upstream, (name, gap, allowed, x.norm())


@pytest.fixture
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize('threads', [1, 2, 5], indirect=True)
@pytest.mark.parametrize(
    'shape',
    [
        (2, 11, 256, 128, 256, 3),
        (1, 1, 1, 16, 16, 1),
        (3, 7, 197, 48, 80, 2),
        (2, 24, 33, 32, 16, 3),
        (6, 5, 50, 64, 32, 3),
        (17, 3, 20, 16, 48, 3),
        (3, 4, 15, 16, 16, 1, 0.2),
        (3, 4, 15, 16, 16, 2, 0.2),
    ],
    ids=str,
)
def test_slot_attention_is_exact(shape, threads):
    module, *inputs = attention_case(*shape)
    assert_exact(attention_losses(), module, *inputs)
    for got, want in zip(cpu.slot_attention(module, *inputs), module(*inputs)):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('field', ['slots', 'attn', 'logits'])
def test_slot_attention_is_exact_when_a_loss_uses_one_output(field):
    module, *inputs = attention_case(2, 4, 30, 32, 48)
    kernel, plain = attention_losses(lambda out: weighted([getattr(out, field)]))
    want = double(plain, module, *inputs)
    inputs = [t.clone().requires_grad_() for t in inputs]
    kernel(module, *inputs).backward()
    got = {f'input {i}': t.grad for i, t in enumerate(inputs)}
    got |= {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in module.named_parameters()}
    for name, a in got.items():
        if not name.endswith(ROUNDING):
            torch.testing.assert_close(a.double(), want[name], rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize('threads', [1, 2, 5], indirect=True)
@pytest.mark.parametrize(
    'shape',
    [(2, 11, 256, 384), (1, 1, 1, 16), (3, 7, 197, 48), (2, 24, 63, 32), (6, 5, 65, 64, 2.0), (4, 12, 130, 768, 0.3)],
    ids=str,
)
def test_attention_decoder_is_exact(shape, threads):
    *case, target = mixture_case(*shape)
    assert_exact(mixture_losses(target), *case)


@pytest.mark.parametrize('threads', [1, 2, 5, 16], indirect=True)
@pytest.mark.parametrize(
    'shape, rows',
    [
        ((2, 7, 256, 128, 128), None),
        ((1, 1, 1, 64, 64), None),
        ((1, 2, 1, 64, 128), None),
        ((3, 5, 50, 64, 192), 70),
        ((2, 11, 33, 192, 64), 10**6),
        ((5, 24, 20, 64, 64), 60),
        ((2, 3, 37, 128, 64), 1),
        ((3, 2, 9, 64, 64), 40),
    ],
    ids=str,
)
def test_mlp_decoder_is_exact(shape, rows, threads):
    *case, target = mlp_case(*shape)
    assert_exact(mlp_losses(target, rows), *case)


@pytest.mark.parametrize('upstream', [1.0, 3.0])
@pytest.mark.parametrize('iters, temperature', [(1, 1.0), (2, 0.2), (3, 0.2)])
def test_slot_attention_and_decoder_together_are_exact(iters, temperature, upstream):
    module = torch.nn.ModuleList([SlotAttention(16, iters, 32, temperature), AttentionDecoder(16, 16, 16, 0.5)])
    target = torch.randn(3, 15, 16)

    def kernel(m, x, s):
        out = cpu.slot_attention(m[0], x, s)
        return cpu.attention_decoder_mse(m[1], out.slots, out.logits, target) + out.slots.square().mean()

    def plain(m, x, s):
        out = m[0](x, s)
        recon = m[1](out.slots, out.logits).recon
        return feature_mse(recon, target.to(x.dtype)) + out.slots.square().mean()

    assert_exact((kernel, plain), shaken(module, 0.2), torch.randn(3, 15, 16), torch.randn(3, 4, 16), upstream=upstream)


CASES = {
    'slot attention': lambda: (  # attn is torch's softmax of the logits, whose bits depend on threads
        attention_losses(lambda out: weighted([out.slots, out.logits])),
        *attention_case(17, 3, 20, 32, 48),
    ),
    'attention decoder': lambda: (lambda *c: (mixture_losses(c[-1]), *c[:-1]))(*mixture_case(5, 7, 130, 48)),
    'MLP decoder': lambda: (lambda *c: (mlp_losses(c[-1]), *c[:-1]))(*mlp_case(3, 7, 100, 128, 64)),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]()


def test_bits_do_not_depend_on_threads_or_repetition(case):
    (kernel, _), module, *inputs = case
    found = []
    for threads in (1, 1, 2, 2, 3, 7, 16):
        torch.set_num_threads(threads)
        found.append(run(kernel, module, *inputs))
    torch.set_num_threads(1)
    for other in found[1:]:
        differing = {name for name, a in other.items() if not a.equal(found[0][name])}
        assert not {name for name in differing if 'norm_inputs' not in name}, differing  # that LayerNorm is torch's


def test_a_second_backward_gives_the_same_gradients(case):
    "With retain_graph, and when the module is used twice in one loss."
    (kernel, _), module, *inputs = case
    want = run(kernel, module, *inputs)
    inputs = [t.clone().requires_grad_() for t in inputs]
    module.zero_grad()
    out = kernel(module, *inputs)
    for repetition in (1, 2):
        out.backward(retain_graph=True)
        for t, name in [
            *((t, f'input {i}') for i, t in enumerate(inputs)),
            *((p, n) for n, p in module.named_parameters()),
        ]:
            torch.testing.assert_close(t.grad, repetition * want[name], rtol=1e-6, atol=1e-12)
    twice = run(lambda *a: kernel(*a) + kernel(*a), module, *(t.detach() for t in inputs))
    for name, x in want.items():
        torch.testing.assert_close(twice[name], 2 * x, rtol=1e-6, atol=1e-12)


def test_a_second_derivative_is_refused(case):
    "It would miss terms."
    (kernel, _), module, *inputs = case
    inputs = [t.clone().requires_grad_() for t in inputs]
    with pytest.raises((SlotnbError, RuntimeError), match='second derivative|no autograd formula'):
        (grad,) = torch.autograd.grad(kernel(module, *inputs), inputs[-1:], create_graph=True)
        grad.sum().backward()


def test_weights_changed_before_the_backward_pass_are_noticed():
    module, *inputs = attention_case(1, 3, 9, 16, 16)
    out = cpu.slot_attention(module, *inputs).slots.sum()
    with torch.no_grad():
        module.to_q.weight.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.backward()


def test_what_waits_for_the_backward_pass_does_not_grow_with_slots_times_patches():
    sizes = {}
    for n in (64, 256):
        decoder, slots, target = mlp_case(2, 7, n, 64, 64)
        kernel, plain = mlp_losses(target)
        sizes[n] = saved_bytes(lambda: plain(decoder, slots)), saved_bytes(lambda: kernel(decoder, slots))
    assert sizes[256][0] - sizes[64][0] > 10 * (sizes[256][1] - sizes[64][1]) and sizes[256][1] < sizes[256][0] / 4


def test_operators_pass_opcheck():
    module, x, slots = attention_case(2, 3, 9, 16, 32)
    params = [module.get_parameter(name).detach().requires_grad_() for name in cpu._PARAMETERS]
    x, slots = x.requires_grad_(), slots.requires_grad_()
    torch.library.opcheck(cpu._slot_attention, (x, slots, params, 2, 0.25, 1e-5))
    out, logits, saved = cpu._slot_attention(x, slots, params, 2, 0.25, 1e-5)
    grads = torch.randn_like(out), torch.randn_like(logits)
    detached = x.detach(), [p.detach() for p in params], saved.detach()
    quick = 'test_schema', 'test_autograd_registration', 'test_faketensor'
    for upstream in (grads, (grads[0], None), (None, grads[1])):
        torch.library.opcheck(cpu._slot_attention_backward, (*detached, [*upstream], 3, 2, 0.25), test_utils=quick)
    feats, logits = torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 9, requires_grad=True)
    torch.library.opcheck(cpu._attention_decoder_mse, ([feats, logits], torch.randn(2, 9, 16), 0.5))
    shapes = (2, 3, 64), (9, 64), (64,), (64, 64), (64,), (64, 64), (64,), (1,)
    inputs = [torch.randn(*shape, requires_grad=True) for shape in shapes]
    torch.library.opcheck(cpu._mlp_decoder_mse, (inputs, torch.randn(2, 9, 64), 0.5, 20))


def test_nan_in_an_image_is_kept_and_does_not_disturb_the_others():
    module, x, slots = attention_case(6, 4, 20, 16, 16)
    (kernel, _), others = attention_losses(), [0, 1, 4, 5]
    clean, outputs = run(kernel, module, x, slots), cpu.slot_attention(module, x, slots)
    x[2:4] = torch.nan
    got = run(kernel, module, x, slots)
    for a, b in zip(cpu.slot_attention(module, x, slots), outputs):
        assert a[2:4].isnan().all() and a[others].equal(b[others])
    assert got['loss'].isnan() and got['to_q.weight'].isnan().all()
    for name in ('input 0', 'input 1'):
        assert got[name][others].equal(clean[name][others])


@pytest.mark.parametrize('spoiled', [0, 1, 2])
def test_nan_in_the_mixture_is_kept_and_does_not_disturb_other_images(spoiled):
    tensors = torch.randn(6, 4, 32), torch.randn(6, 4, 20), torch.randn(6, 20, 32)

    def grads():
        leaves = [t.clone().requires_grad_() for t in tensors[:2]]
        mse, _ = cpu._attention_decoder_mse(leaves, tensors[2], 0.5)
        mse.backward()
        return mse, *(t.grad for t in leaves)

    clean = grads()
    tensors[spoiled][2, 1, 3] = torch.nan
    got, others = grads(), [0, 1, 3, 4, 5]
    assert got[0].isnan() and got[1][2].isnan().any() and got[2][2].isnan().any()
    assert all(a[others].equal(b[others]) for a, b in zip(got[1:], clean[1:]))


def test_nan_in_the_mlp_decoder_is_kept():
    decoder, slots, target = mlp_case(2, 3, 20, 64, 64)
    slots[1, 0, 0] = torch.nan
    got = run(mlp_losses(target)[0], decoder, slots)
    assert got.pop('loss').isnan()
    d_slots = got.pop('input 0')
    assert d_slots[1].isnan().any() and not d_slots[0].isnan().any()
    assert all(g.isnan().any() for g in got.values())


def test_a_model_full_of_nan_leaves_no_trace_in_the_next():
    cases = [attention_case(2, 4, 15, 16, 16, 3, 0.5) for _ in range(3)]
    (kernel, _), clean = attention_losses(), None
    for spoil in (False, True):
        if spoil:
            cases[1][1].fill_(torch.nan)
        found = [run(kernel, *c) for c in cases]
        if clean:
            assert found[1]['to_q.weight'].isnan().all()
            assert all(found[i][name].equal(clean[i][name]) for i in (0, 2) for name in clean[i])
        clean = found


@pytest.mark.parametrize('density', [0, 0.02, 0.5, 1])
@pytest.mark.parametrize('threads, rows, i, o', [(1, 1, 1, 1), (2, 50, 2, 3), (5, 61, 5, 1)])
def test_skipping_zeros_changes_no_bit(density, threads, rows, i, o):
    "A layer by itself; widths in panels."
    library = cpu.build()
    wide = library.mlp_decoder_panel()
    i, o = i * wide, o * wide
    x, weight, bias = torch.randn(rows, i) * (torch.rand(rows, i) < density), torch.randn(o, i), torch.randn(o)
    panels, packed = x.view(rows, -1, wide).transpose(0, 1).contiguous(), torch.empty(threads * wide * i)
    found = []
    for mask in (None, torch.zeros(-(-i // 64), rows, dtype=torch.int64)):
        found.append(torch.empty(o // wide, rows, wide))
        places = cpu._at([panels, mask, weight, bias, found[-1], packed])
        library.mlp_decoder_layer(*places, rows, o, i, threads)
    assert found[0].equal(found[1])
    want = (x @ weight.T + bias).relu()
    torch.testing.assert_close(found[0].transpose(0, 1).reshape(rows, o), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('threads', [1, 3], indirect=True)
@pytest.mark.parametrize('zeros', ['of slots', 'of numbers', 'none', 'all of a layer', 'all but a unit'])
def test_mlp_decoder_is_exact_wherever_zeros_are(zeros, threads):
    "Patches share zeros or do not; more patches than are grouped; widths of five panels."
    wide = 5 * cpu.build().mlp_decoder_panel()
    decoder, slots, target = mlp_case(2, 3, 200, wide, wide)
    with torch.no_grad():
        if zeros == 'of numbers':
            decoder.pos += 3 * torch.randn_like(decoder.pos)
        if zeros == 'none':
            for layer in (decoder.first, *decoder.hidden):
                layer.weight *= 0.1
                layer.bias += 3
        if zeros in ('all of a layer', 'all but a unit'):
            decoder.hidden[0].bias -= 1000
        if zeros == 'all but a unit':
            decoder.hidden[0].bias[wide // 2] += 2000
    kernel, plain = mlp_losses(target)
    want, got = double(plain, decoder, slots), run(kernel, decoder, slots)
    single = run(plain, decoder, slots)
    assert abs(got['loss'] / want['loss'] - 1) < 1e-6
    for name, b in want.items():  # an activation at ReLU's kink makes some 1e-4
        gap, allowed = ((y[name] - b).norm() for y in (got, single))
        assert gap <= 4 * allowed + 3e-4 * b.norm() + 1e-6 * name.endswith(ROUNDING), name


def test_block_size_changes_only_rounding():
    decoder, slots, target = mlp_case(3, 7, 100, 128, 64)
    a, b = (run(mlp_losses(target, rows)[0], decoder, slots) for rows in (None, 300))
    for name in a:
        if not name.endswith(ROUNDING):
            assert (a[name] - b[name]).norm() < 1e-4 * a[name].norm()


def test_inputs_need_not_be_contiguous_or_differentiable():
    module, x, slots = attention_case(2, 4, 30, 32, 48)
    want = cpu.slot_attention(module, x, slots)
    strided = x.transpose(0, 1).contiguous().transpose(0, 1), slots.mT.contiguous().mT
    with torch.no_grad():
        got = cpu.slot_attention(module, *strided)
    assert all(a.equal(b) for a, b in zip(got, want)) and not got.slots.requires_grad


def unsupported():
    x, slots = torch.zeros(1, 9, 32), torch.zeros(1, 3, 32)
    return {
        'float64': (SlotAttention(32).double(), x.double(), slots.double()),
        'float64 inputs': (SlotAttention(32), x.double(), slots),
        'on meta': (SlotAttention(32).to('meta'), x, slots),
        'no image': (SlotAttention(32), x[:0], slots[:0]),
        'not multiples of 16': (SlotAttention(20), x[..., :20], slots[..., :20]),
        '32 and 20': (SlotAttention(32, hidden_dim=20), x, slots),
        'patch or iteration': (SlotAttention(32, 0), x, slots),
    }


@pytest.mark.parametrize('match', unsupported())
def test_unsupported_slot_attention_is_refused(match):
    module, *tensors = unsupported()[match]
    assert match.removesuffix(' inputs') in cpu.why_unsupported(module, *tensors)
    with pytest.raises(SlotnbError, match=f'SlotAttention has no CPU kernel here: .*{match.removesuffix(" inputs")}'):
        cpu.slot_attention(module, *tensors)


def test_unsupported_decoders_are_refused():
    slots, target = torch.zeros(1, 3, 16), torch.zeros(1, 9, 64)
    logits = torch.zeros(1, 3, 9)
    for decoder, args, match in (
        (AttentionDecoder(16, 64), (slots, logits, target.double()), 'float64'),
        (AttentionDecoder(16, 64), (slots[:0], logits[:0], target[:0]), 'no image'),
        (AttentionDecoder(16, 10), (slots, logits, target[..., :10]), 'not multiples of 16'),
        (MLPDecoder(16, 64, 9, 64), (slots, target.double()), 'float64'),
        (MLPDecoder(16, 64, 9, 64), (slots[:0], target[:0]), 'no image'),
        (MLPDecoder(16, 40, 9, 64), (slots, target[..., :40]), 'not multiples of'),
        (MLPDecoder(16, 64, 9, 40), (slots, target), 'not multiples of'),
    ):
        call = cpu.attention_decoder_mse if len(args) == 3 else cpu.mlp_decoder_mse
        assert match in cpu.why_unsupported(decoder, *args)
        with pytest.raises(SlotnbError, match=match):
            call(decoder, *args)
    assert 'no kernel for Linear' in cpu.why_unsupported(torch.nn.Linear(16, 16), slots)


def test_wrong_shapes_are_refused():
    "Before anything is read beyond its end."
    module, x, slots = attention_case(4, 3, 9, 16, 16)
    for bad, match in (
        ((x, slots[:3]), 'slots has shape'),
        ((torch.zeros(4, 9, 32), torch.zeros(4, 3, 32)), 'inputs has shape'),
        ((x, slots[..., :8]), 'slots has shape'),
        ((x[0], slots), 'inputs has shape'),
    ):
        with pytest.raises(SlotnbError, match=match):
            cpu.slot_attention(module, *bad)
    decoder, slots, logits, target = mixture_case(4, 3, 9, 16)
    for bad, match in (
        ((slots[:2], logits, target), 'logits has shape'),
        ((slots[:, :2], logits, target), 'logits has shape'),
        ((slots, logits, target[:, :8]), 'target has shape'),
        ((slots, logits, target[..., :8]), 'target has shape'),
        ((slots, logits, target.requires_grad_()), 'no gradient for target'),
    ):
        with pytest.raises(SlotnbError, match=match):
            cpu.attention_decoder_mse(decoder, *bad)
    decoder, slots, target = mlp_case(1, 2, 9, 64, 64)
    for bad, match in (
        ((slots, target[:, :5]), 'target has shape'),
        ((slots, torch.zeros(1, 9, 128)), 'target has shape'),
        ((slots[0], target), 'slots has shape'),
        ((slots[..., :40], target), 'slots has shape'),
        ((slots, target.requires_grad_()), 'no gradient for target'),
    ):
        with pytest.raises(SlotnbError, match=match):
            cpu.mlp_decoder_mse(decoder, *bad)


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    "A cache of its own, and nothing loaded."
    monkeypatch.setenv('SLOTNB_CACHE', str(tmp_path))
    monkeypatch.delenv('CXX', raising=False)
    cpu._library.cache_clear(), cpu.build.cache_clear()
    yield tmp_path / 'kernels'
    monkeypatch.undo()
    cpu._library.cache_clear(), cpu.build.cache_clear()


def compiler(path, body):
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo fake 1.0 && exit 0\n{body}\n')
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    'cxx, match',
    [('/nowhere/g++', 'no C\\+\\+ compiler \\(/nowhere/g\\+\\+\\)'), ('fake', 'does not compile .*broken on purpose')],
)
def test_without_a_compiler_there_is_a_reason(fresh, tmp_path, monkeypatch, cxx, match):
    cxx = compiler(tmp_path / 'fake', 'echo broken on purpose >&2; exit 1') if cxx == 'fake' else cxx
    monkeypatch.setenv('CXX', cxx)
    module, x, slots = attention_case(1, 3, 9, 16, 16)
    with pytest.raises(SlotnbError, match=match):
        cpu.build()
    with pytest.raises(SlotnbError, match=match):
        cpu.slot_attention(module, x, slots)
    assert cpu.why_unsupported(module, x) and not (fresh.exists() and [*fresh.iterdir()])
    module(x, slots)  # the module itself works


def test_other_processors_have_a_reason(fresh, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: 'DEFAULT')
    assert 'neither AVX2 nor AVX-512' in cpu.why_unsupported(SlotAttention(16), torch.zeros(1, 1, 16))


def test_a_damaged_library_has_a_reason(fresh, tmp_path, monkeypatch):
    monkeypatch.setenv('CXX', compiler(tmp_path / 'fake', 'for last; do :; done; echo no library > "$last"'))
    assert 'cannot be loaded' in cpu.why_unsupported(SlotAttention(16), torch.zeros(1, 1, 16))


def test_folder_and_library_are_private_and_compiled_once(fresh, tmp_path, monkeypatch):
    log = tmp_path / 'log'
    monkeypatch.setenv('CXX', compiler(tmp_path / 'counted', f'echo call >> {log}\nexec g++ "$@" -O0'))
    for _ in range(2):
        cpu._library.cache_clear(), cpu.build.cache_clear()
        assert cpu.build().mlp_decoder_panel() in (16, 64)
    assert cpu.build() is cpu.build() and log.read_text() == 'call\n'
    assert stat.S_IMODE(fresh.stat().st_mode) == 0o700 and len([*fresh.iterdir()]) == 1


@pytest.mark.parametrize('mode', [0o777, 0o720])
def test_a_folder_that_others_can_write_is_refused(fresh, mode):
    fresh.mkdir()
    fresh.chmod(mode)
    with pytest.raises(SlotnbError, match=f'{fresh} is writable by other users; .*chmod 700'):
        cpu.why_unsupported(SlotAttention(16), torch.zeros(1, 1, 16))


def test_a_folder_of_another_user_is_refused(fresh, monkeypatch):
    fresh.mkdir(mode=0o700)
    monkeypatch.setattr(os, 'getuid', lambda: fresh.stat().st_uid + 1)
    with pytest.raises(SlotnbError, match=f'{fresh} belongs to another user; set SLOTNB_CACHE'):
        cpu.build()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == 'AVX2', reason='has no wider registers than AVX2')
def test_on_narrow_registers():
    "A processor with AVX-512 also runs the kernels for AVX2."
    code = (
        'import torch, pytest, sys; assert torch.backends.cpu.get_cpu_capability() == "AVX2"; '
        'sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "exact or nan or bit", sys.argv[1]]))'
    )
    env = os.environ | dict(ATEN_CPU_CAPABILITY='avx2')
    done = subprocess.run([sys.executable, '-c', code, __file__], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize('capability', cpu._REGISTERS)
def test_all_registers_compile_without_warnings(capability):
    folder = Path(cpu.__file__).parent / 'src'
    flags = [*cpu._FLAGS, *cpu._REGISTERS[capability], '-O0', '-Wall', '-Wextra', '-Werror', '-fsyntax-only']
    done = subprocess.run(['g++', *flags, *folder.glob('*.cpp')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
