"Compiled rounds of slot attention, and the mixture of its slots: the calls of torch in single precision, for any number of slots, patches, models and threads, on both widths of registers."

import os, subprocess, sys
import pytest, torch
from slotnb import backward
from slotnb import rounds
from slotnb.backward import _PARTS, _SlotAttention, attend
from slotnb.core import SlotnbError
from slotnb.slot_attention import SlotAttention

here = rounds.rounds_obstacle(torch.zeros(1, 1, 16), 16)
needs_rounds = pytest.mark.skipif(bool(here), reason=here)
CANCELLED = 3 + _PARTS.index('norm_slots.bias') + 1  # the softmax over slots cancels it: its gradient is rounding


def case(b, k, n, d, h, runs=1, seed=0):
    "Patches, slots, and weights of so many models, none of which is where it starts."
    torch.manual_seed(seed)
    modules = [SlotAttention(d, hidden_dim=h) for _ in range(runs)]
    for m in modules:
        for p in m.parameters():
            p.data += 0.1 * torch.randn_like(p)
    params = [
        torch.stack([m.get_parameter(name).detach() for m in modules])
        if runs > 1
        else modules[0].get_parameter(name).detach()
        for name in _PARTS
    ]
    return [torch.randn(b, n, d), torch.randn(b, k, d), *params], torch.randn(b, k, d), torch.randn(b, k, n)


def run(way, tensors, d_slots, d_logits, dtype=torch.float32, iters=3):
    "Slots, logits and all gradients."
    leaves = [t.to(dtype).clone().requires_grad_() for t in tensors]
    out = way.apply(leaves[0], leaves[1], iters, leaves[0].shape[-1] ** -0.5, 1e-5, *leaves[2:])
    torch.autograd.backward(*zip(*((o, g.to(dtype)) for o, g in zip(out, (d_slots, d_logits)) if g is not None)))
    return [*(o.detach() for o in out), *(t.grad for t in leaves)]


def error(got, want):
    return max(
        ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
        for i, (a, b) in enumerate(zip(got, want, strict=True))
        if i != CANCELLED
    )


@needs_rounds
@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize(
    'b, k, n, d, h, runs, iters',
    [
        (2, 11, 256, 128, 256, 1, 3),
        (1, 1, 1, 16, 16, 1, 1),
        (3, 7, 197, 48, 80, 1, 2),
        (2, 24, 33, 32, 16, 1, 3),
        (6, 5, 50, 64, 32, 3, 3),
        (17, 3, 20, 16, 48, 1, 3),
        (34, 3, 20, 16, 48, 2, 3),
    ],
)
def test_as_exact_as_torchs_calls(b, k, n, d, h, runs, iters, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        arguments = case(b, k, n, d, h, runs)
        want = run(_SlotAttention, *arguments, torch.float64, iters)
        got, calls = (error(run(way, *arguments, iters=iters), want) for way in (rounds.Rounds, _SlotAttention))
    finally:
        torch.set_num_threads(before)
    assert got < 4 * calls + 1e-6


@needs_rounds
def test_on_narrow_registers(tmp_path):
    "A processor without AVX-512 compiles its own."
    code = 'import torch, pytest, sys; assert torch.backends.cpu.get_cpu_capability()=="AVX2"; sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "torchs_calls or alone_counts or nan", sys.argv[1]]))'
    done = subprocess.run(
        [sys.executable, '-c', code, __file__],
        env=os.environ | dict(ATEN_CPU_CAPABILITY='avx2'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


@needs_rounds
@pytest.mark.parametrize('missing', [0, 1])
def test_what_has_no_use_alone_counts_as_zero(missing):
    "Only the slots, or only the logits, go into a loss."
    tensors, *grads = case(2, 4, 30, 32, 48)
    grads[missing] = None
    want, got = run(_SlotAttention, tensors, *grads, torch.float64), run(rounds.Rounds, tensors, *grads)
    for i, (a, b) in enumerate(zip(got, want)):
        if i != CANCELLED:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


@needs_rounds
def test_a_model_full_of_nan_is_seen_and_does_not_disturb_the_others():
    tensors, *grads = case(6, 4, 20, 16, 16, runs=3)
    clean = run(rounds.Rounds, tensors, *grads)
    tensors[0][2:4] = torch.nan
    got = run(rounds.Rounds, tensors, *grads)
    assert got[0][2:4].isnan().all() and got[2 + 2 + _PARTS.index('to_q.weight')][1].isnan().all()
    for a, b in zip(got[:4], clean[:4]):
        torch.testing.assert_close(a[[0, 1, 4, 5]], b[[0, 1, 4, 5]], rtol=0, atol=0)
    for a, b in zip(got[4:], clean[4:]):
        torch.testing.assert_close(a[[0, 2]], b[[0, 2]], rtol=0, atol=0)


@needs_rounds
def test_attend_takes_them_where_it_can(monkeypatch):
    module, taken = SlotAttention(32), []
    monkeypatch.setattr(rounds.Rounds, 'apply', lambda *a: taken.append(a) or (None, None))
    params, slots = dict(module.named_parameters()), torch.randn(1, 3, 32)
    attend(module, torch.randn(1, 9, 32), slots, params)
    assert len(taken) == 1
    attend(module.double(), torch.randn(1, 9, 32).double(), slots.double(), dict(module.named_parameters()))
    assert len(taken) == 1  # double precision
    other = SlotAttention(20)
    attend(other, torch.randn(1, 9, 20), torch.randn(1, 3, 20), dict(other.named_parameters()))
    assert len(taken) == 1  # no multiple of 16
    assert 'multiples of 16' in rounds.rounds_obstacle(torch.zeros(1, 1, 20), 16)
    assert 'single precision' in rounds.rounds_obstacle(torch.zeros(1, 1, 16).double(), 16)


@needs_rounds
def test_differentiated_once():
    tensors, *_ = case(1, 3, 9, 16, 16)
    leaves = [t.requires_grad_() for t in tensors]
    out = rounds.Rounds.apply(*leaves[:2], 2, 0.25, 1e-5, *leaves[2:])[0].sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        out.backward()


@needs_rounds
def test_what_does_not_fit_is_refused():
    tensors, *_ = case(4, 3, 9, 16, 16, runs=2)

    def call(*t):
        return rounds.Rounds.apply(*t[:2], 3, 0.25, 1e-5, *t[2:])

    with pytest.raises(SlotnbError, match='single precision'):
        call(*tensors[:2], *(t.double() for t in tensors[2:]))
    with pytest.raises(SlotnbError, match='3 images'):
        call(*(t[:3] for t in tensors[:2]), *tensors[2:])
    with pytest.raises(SlotnbError, match='width 32'):
        call(torch.zeros(4, 9, 32), torch.zeros(4, 3, 32), *tensors[2:])
    assert 'no image' in rounds.rounds_obstacle(tensors[0][:0], 16)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = call(*leaves)[0].sum()
    with torch.no_grad():
        leaves[4].add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        out.backward()


def test_without_a_compiler_torchs_calls_are_taken(monkeypatch):
    monkeypatch.setattr(rounds, '_library', lambda: 'there is no C++ compiler (g++ or clang++)')
    assert 'compiler' in rounds.rounds_obstacle(torch.zeros(1, 1, 16), 16)
    module = SlotAttention(16)
    x, slots = torch.randn(1, 9, 16), torch.randn(1, 3, 16)
    got, want = attend(module, module.norm_inputs(x), slots, dict(module.named_parameters())), module(x, slots)
    torch.testing.assert_close(got[0], want.slots)
    assert backward.Rounds is rounds.Rounds


def mixture(way, feats, logits, target, temperature, runs, dtype=torch.float32):
    "MSE of each run, gradients for feats and for logits."
    return way(*(t.to(dtype) for t in (feats, logits, target)), torch.as_tensor(temperature).to(dtype), runs)


@needs_rounds
@pytest.mark.parametrize('threads', [1, 2, 5])
@pytest.mark.parametrize(
    'b, k, n, d, runs',
    [
        (2, 11, 256, 384, 1),
        (1, 1, 1, 16, 1),
        (3, 7, 197, 48, 3),
        (2, 24, 63, 32, 1),
        (6, 5, 65, 64, 2),
        (4, 12, 130, 768, 4),
    ],
)
def test_mixture_is_as_exact_as_torchs_calls(b, k, n, d, runs, threads):
    "Each image with a temperature of its own."
    torch.manual_seed(0)
    arguments = (
        torch.randn(b, k, d),
        3 * torch.randn(b, k, n),
        torch.randn(b, n, d),
        torch.linspace(0.3, 2, b)[:, None, None],
        runs,
    )
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        want = mixture(backward._mixed_calls, *arguments, dtype=torch.float64)
        got, calls = (mixture(way, *arguments) for way in (rounds.mixed_gradients, backward._mixed_calls))
    finally:
        torch.set_num_threads(before)
    for name, a, c, x in zip(('loss', 'feats', 'logits'), got, calls, want, strict=True):
        gap, allowed = ((y.double() - x).norm().item() for y in (a, c))
        assert a.dtype == torch.float32 and gap < 4 * allowed + 1e-6 * x.norm() + 1e-7, (
            name,
            gap,
            allowed,
        )  # one slot alone has a gradient of rounding for its logits


@needs_rounds
def test_mixture_full_of_nan_does_not_disturb_the_others():
    torch.manual_seed(0)
    feats, logits, target = torch.randn(6, 4, 32), torch.randn(6, 4, 20), torch.randn(6, 20, 32)
    clean = rounds.mixed_gradients(feats, logits, target, 0.5, 3)
    for spoilt in (feats, logits, target):
        kept, spoilt[2, 1, 3] = spoilt[2, 1, 3].item(), torch.nan
        got = rounds.mixed_gradients(feats, logits, target, 0.5, 3)
        spoilt[2, 1, 3] = kept
        assert got[0][1].isnan() and got[1][2].isnan().any() and got[2][2].isnan().any()
        for a, b in zip(got, clean):
            per = len(a) // 3
            torch.testing.assert_close(
                a[[*range(per), *range(2 * per, 3 * per)]], b[[*range(per), *range(2 * per, 3 * per)]], rtol=0, atol=0
            )


@needs_rounds
def test_mixed_mse_takes_the_compiled_mixture_where_it_can(monkeypatch):
    taken, real = [], backward.mixed_gradients
    monkeypatch.setattr(backward, 'mixed_gradients', lambda *a: taken.append(a) or real(*a))

    def loss(dtype=torch.float32, d=32):
        return backward.mixed_mse(
            torch.randn(2, 3, d, dtype=dtype), torch.randn(2, 3, 9, dtype=dtype), torch.randn(2, 9, d, dtype=dtype), 0.5
        )

    loss()
    assert len(taken) == 1
    loss(torch.float64)
    loss(d=20)
    assert len(taken) == 1  # double precision, no multiple of 16
    with pytest.raises(SlotnbError, match='single precision'):
        rounds.mixed_gradients(torch.randn(2, 3, 16).double(), torch.randn(2, 3, 9), torch.randn(2, 9, 16))


@needs_rounds
def test_mixture_refuses_what_does_not_fit():
    "Before anything is read beyond its end."
    feats, logits, target = torch.randn(4, 3, 16), torch.randn(4, 3, 9), torch.randn(4, 9, 16)
    for bad, match in (
        ((feats.double(), logits, target), 'single precision'),
        ((feats[:2], logits, target), 'feats has shape'),
        ((feats[:, :2], logits, target), 'feats has shape'),
        ((feats, logits, target[:, :8]), 'target has shape'),
        ((feats, logits, target[..., :8]), 'target has shape'),
        ((feats[..., :10], logits, target[..., :10]), 'multiples of 16'),
        ((feats[:0], logits[:0], target[:0]), 'no image'),
    ):
        with pytest.raises(SlotnbError, match=match):
            rounds.mixed_gradients(*bad)
    with pytest.raises(SlotnbError, match='3 runs'):
        rounds.mixed_gradients(feats, logits, target, 0.5, 3)
    with pytest.raises(SlotnbError, match='feats has shape'):
        backward.mixed_mse(feats[:, :2], logits, target)
