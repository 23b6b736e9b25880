"The MLP broadcast decoder in panels: the same loss and gradients, whatever the shapes, blocks, threads and width of registers; and the way without them."

import copy, os, subprocess, sys
import pytest, torch
from slotnb import panels
from slotnb.fast import blocks as step
from slotnb.core import SlotnbError
from slotnb.decoder import MLPDecoder
from slotnb.losses import feature_mse
from slotnb.products import linear
from slotnb.fast.blocks import blocked_mse

here = panels.panels_obstacle(64, 64)
needs_panels = pytest.mark.skipif(bool(here), reason=here)


def case(images, slots, patches, hidden, feats, seed=0):
    "A decoder that is not where it starts, slots and target."
    torch.manual_seed(seed)
    decoder = MLPDecoder(48, feats, patches, hidden, mask_temperature=0.5)
    for p in decoder.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return decoder, torch.randn(images, slots, 48), torch.randn(images, patches, feats)


def gradients(loss_of, decoder, slots, target):
    slots = slots.clone().requires_grad_()
    decoder.zero_grad()
    loss = loss_of(decoder, slots, target)
    loss.backward()
    return [loss.detach(), slots.grad, *(p.grad for p in decoder.parameters())]


def exact(decoder, slots, target):
    d = MLPDecoder(
        slots.shape[-1],
        target.shape[-1],
        len(decoder.pos),
        decoder.first.out_features,
        mask_temperature=decoder.mask_temperature,
    ).double()
    d.load_state_dict(decoder.state_dict())
    return gradients(lambda d, s, t: feature_mse(d(s).recon, t), d, slots.double(), target.double())


def off(got, want):
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        for a, b in zip(got, want, strict=True)
        if b.numel() > 1 or b is want[0]
    )


def with_threads(threads, f, *args):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return f(*args)
    finally:
        torch.set_num_threads(before)


@needs_panels
@pytest.mark.parametrize('threads', [1, 2, 5, 16])
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
def test_gradients_of_double_precision(shape, rows, threads):
    decoder, slots, target = case(*shape)
    want = exact(decoder, slots, target)
    got = with_threads(
        threads, gradients, lambda d, s, t: blocked_mse(d, s, t, block_rows=rows), decoder, slots, target
    )
    calls = gradients(lambda d, s, t: feature_mse(d(s).recon, t), decoder, slots, target)
    assert off(got, want) < 4 * off(calls, want) + 2e-6
    torch.testing.assert_close(got[-2].double(), want[-2], rtol=1e-4, atol=1e-6)


@needs_panels
def test_they_are_taken_where_they_can_be(monkeypatch):
    taken, own = [], panels.paneled_mse
    monkeypatch.setattr(step, 'paneled_mse', lambda *a: taken.append(1) or own(*a))

    def loss(decoder, slots, target, precision='fp32'):
        return gradients(lambda *a: blocked_mse(*a, precision), decoder, slots, target)

    decoder, *data = case(1, 3, 9, 64, 64)
    by_panels = loss(decoder, *data)
    assert len(taken) == 1
    if step.tiles_obstacle(64, 64):
        assert all(a.equal(b) for a, b in zip(loss(decoder, *data, 'bf16'), by_panels))
        assert len(taken) == 2
        taken.pop()  # no matrix units for bfloat16
    loss(copy.deepcopy(decoder).double(), *(t.double() for t in data))
    loss(*case(1, 3, 9, 40, 64))
    loss(*case(1, 3, 9, 64, 40))
    assert len(taken) == 1  # double precision, odd widths
    monkeypatch.setattr(panels, '_library', lambda: 'there is no C++ compiler (g++ or clang++)')
    assert 'no C++ compiler' in panels.panels_obstacle(64, 64)
    torch.testing.assert_close(loss(decoder, *data), by_panels, rtol=1e-4, atol=1e-5)
    assert len(taken) == 1


@needs_panels
def test_threads_and_blocks_change_nothing_but_the_last_digits():
    decoder, slots, target = case(3, 7, 100, 128, 64)
    found = [
        with_threads(threads, gradients, lambda d, s, t: blocked_mse(d, s, t, block_rows=rows), decoder, slots, target)
        for threads, rows in ((1, None), (1, 300), (2, None), (2, None), (7, None))
    ]
    for other in found[1:]:
        assert off(other, found[0]) < 1e-4
    for other in (found[2], found[3], found[4]):
        assert all(a.equal(b) for a, b in zip(other, found[0]))  # however many share them out


@needs_panels
def test_a_nan_is_seen():
    decoder, slots, target = case(2, 3, 20, 64, 64)
    slots[1, 0, 0] = torch.nan
    got = gradients(blocked_mse, decoder, slots, target)
    assert got[0].isnan() and got[1][1].isnan().any() and not got[1][0].isnan().any()
    assert all(p.isnan().any() for p in got[2:])


@needs_panels
@pytest.mark.parametrize('kept', [0, 0.02, 0.5, 1])
def test_a_layer_by_itself(kept):
    "What is left out for its zeros changes no bit."
    torch.manual_seed(0)
    wide = panels._library().panel()
    for threads, (rows, i, o) in zip((1, 2, 5), ((1, wide, wide), (50, 2 * wide, 3 * wide), (61, 5 * wide, wide))):
        x, weight, bias = torch.randn(rows, i) * (torch.rand(rows, i) < kept), torch.randn(o, i), torch.randn(o)
        got = with_threads(threads, panels.panel_linear, panels.in_panels(x), weight, bias)
        assert got.equal(with_threads(threads, panels.panel_linear, panels.in_panels(x), weight, bias, False))
        torch.testing.assert_close(
            got.transpose(0, 1).reshape(rows, o), linear(x, weight, bias, relu=True), rtol=1e-4, atol=1e-4
        )


@needs_panels
@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('zeros', ['of slots', 'of numbers', 'none', 'all of a layer', 'all but a unit'])
def test_gradients_wherever_zeros_are(zeros, threads):
    "Patches of a slot have zeros in common, or have not, or none, or nothing else; more of them than go together; widths that are five panels."
    wide = 5 * panels._library().panel()
    decoder, slots, target = case(2, 3, 200, wide, wide)
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
    want = exact(decoder, slots, target)
    got = with_threads(threads, gradients, blocked_mse, decoder, slots, target)
    calls = gradients(lambda d, s, t: feature_mse(d(s).recon, t), decoder, slots, target)
    assert abs(got[0] / want[0] - 1) < 1e-6
    for a, b, c in zip(got, want, calls):
        assert (a - b).norm() <= 4 * (c - b).norm() + 3e-4 * b.norm() + 1e-6 * (
            b.numel() == 1
        )  # an activation at ReLU's kink makes some 1e-4; that of alpha's bias is zero


@needs_panels
def test_on_narrow_registers():
    "A processor without AVX-512 compiles its own."
    code = 'import torch, pytest, sys; assert torch.backends.cpu.get_cpu_capability()=="AVX2"; sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "double_precision or nan or by_itself or zeros_are", sys.argv[1]]))'
    done = subprocess.run(
        [sys.executable, '-c', code, __file__],
        env=os.environ | dict(ATEN_CPU_CAPABILITY='avx2'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@needs_panels
def test_what_does_not_fit_is_refused():
    args = [
        torch.zeros(1, 2, 64),
        torch.zeros(9, 64),
        torch.zeros(64),
        torch.zeros(()),
        torch.zeros(1, 9, 64),
        1.0,
        [torch.zeros(64, 64), torch.zeros(64)],
    ]
    panels.paneled_mse(*args)
    with pytest.raises(SlotnbError, match='target has shape'):
        panels.paneled_mse(*args[:4], args[4][:, :5], *args[5:])
    with pytest.raises(SlotnbError, match='single precision'):
        panels.paneled_mse(*args[:4], args[4].double(), *args[5:])
    with pytest.raises(SlotnbError, match='no multiples of'):
        panels.paneled_mse(*args[:4], torch.zeros(1, 9, 40), *args[5:])
    x = torch.zeros(1, 3, panels._library().panel())
    with pytest.raises(SlotnbError, match='bias has shape'):
        panels.panel_linear(x, torch.zeros(64, x.shape[-1]), torch.zeros(5))
    with pytest.raises(SlotnbError, match='single precision'):
        panels.panel_linear(x, torch.zeros(64, x.shape[-1]).double(), torch.zeros(64))
