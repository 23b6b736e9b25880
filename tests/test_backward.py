"The written-out backward pass of slot attention and of the mixture: autograd's gradients, alone and in stacks, on the CPU and on CUDA."

import pytest, torch
from slotnb.backward import attend, linear_layers, mixed_mse, part_of
from slotnb.core import SlotnbError
from slotnb.decoder import AttentionDecoder
from slotnb.losses import feature_mse
from slotnb.slot_attention import InputProjection, SlotAttention
from slotnb.fast.blocks import per_slot

CANCELLED = 'norm_slots.bias'  # the softmax over slots cancels it: its gradient is rounding


def shaken(module, seed):
    "No parameter is where it starts: LayerNorms and biases count too."
    torch.manual_seed(seed)
    module.double()
    for p in module.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return module


def data(b, k=4, n=15, d=12, out=10, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(*shape, dtype=torch.double, generator=g).requires_grad_() for shape in ((b, n, d), (b, k, d))
    ], torch.randn(b, n, out, dtype=torch.double, generator=g)


def alone(attention, decoder, x, slots, target):
    "The module as it is read, and autograd."
    for p in (*attention.parameters(), *decoder.parameters()):
        p.grad = None
    out = attention(x, slots)
    loss = feature_mse(decoder(out.slots, out.logits).recon, target) + out.slots.square().mean()
    loss.backward()
    return loss.detach(), *({n: p.grad for n, p in m.named_parameters()} for m in (attention, decoder))


@pytest.mark.parametrize('rounds', [1, 2, 3])
@pytest.mark.parametrize('temperature', [1.0, 0.2])
def test_one_model(rounds, temperature):
    attention, decoder = (
        shaken(SlotAttention(12, rounds, 16, temperature), 0),
        shaken(AttentionDecoder(12, 10, 8, 0.5), 1),
    )
    (x, slots), target = data(3)
    want, *grads = alone(attention, decoder, x, slots, target)
    inputs = x.grad, slots.grad
    x.grad = slots.grad = None
    attention.zero_grad()
    decoder.zero_grad()
    out, logits = attend(attention, attention.norm_inputs(x), slots, dict(attention.named_parameters()))
    (mse,) = mixed_mse(decoder.per_slot(out), logits, target, decoder.mask_temperature)
    got = mse + out.square().mean()
    got.backward()
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    for a, b in zip((x.grad, slots.grad), inputs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    for m, old in zip((attention, decoder), grads):
        for name, p in m.named_parameters():
            if name != CANCELLED:
                torch.testing.assert_close(p.grad, old[name], rtol=1e-9, atol=1e-12, msg=name)


def test_a_stack_is_each_model_alone():
    "Three models of other weights and mask temperatures, two images each; one of them is full of NaN and the others don't notice."
    models = [
        (shaken(SlotAttention(12, 3, 16, 0.5), i), shaken(AttentionDecoder(12, 10, 8, 0.3 + i), 9 + i))
        for i in range(3)
    ]
    sets = [data(2, seed=i) for i in range(3)]
    sets[1][0][0].data.fill_(torch.nan)
    want = [alone(*m, *xs, t) for m, (xs, t) in zip(models, sets)]
    params = {
        n: torch.stack([a.get_parameter(n).detach() for a, _ in models]).requires_grad_()
        for n, _ in models[0][0].named_parameters()
    }
    x = torch.cat([a.norm_inputs(xs[0]) for (a, _), (xs, _) in zip(models, sets)])
    start = torch.cat([xs[1] for xs, _ in sets])
    slots, logits = attend(models[0][0], x, start, params)
    feats = torch.cat([d.per_slot(s) for (_, d), s in zip(models, slots.split(2))])
    temperature = torch.tensor([d.mask_temperature for _, d in models], dtype=torch.double).repeat_interleave(2)[
        :, None, None
    ]
    loss = mixed_mse(feats, logits, torch.cat([t for _, t in sets]), temperature, 3) + slots.square().view(3, -1).mean(
        1
    )
    loss.sum().backward()
    for i in (0, 2):
        torch.testing.assert_close(loss[i].detach(), want[i][0], rtol=1e-12, atol=0)
        for name, p in params.items():
            if name != CANCELLED and 'norm_inputs' not in name:  # `norm_inputs` stands before
                torch.testing.assert_close(p.grad[i], want[i][1][name], rtol=1e-9, atol=1e-12, msg=name)
    assert loss[1].isnan() and params['to_q.weight'].grad[1].isnan().all()


def gradients_of(f, inputs, params):
    for t in (*inputs, *params):
        t.grad = None
    out = f()
    (out.square().mean() * out.shape[0]).backward()  # so that each of r modules has the gradient of its own mean
    return out.detach(), [t.grad for t in (*inputs, *params)]


@pytest.mark.parametrize('kind', InputProjection.kinds)
def test_layers(kind):
    "The projection of each kind, one and three at once, also where its input has a gradient."
    modules = [shaken(InputProjection(10, 6, 8, kind), i) for i in range(3)]
    rows = [torch.randn(14, 10, dtype=torch.double, requires_grad=True) for _ in modules]
    want = [gradients_of(lambda: m(x)[None], [x], list(m.parameters())) for m, x in zip(modules, rows)]
    for m, x, (out, grads) in zip(modules, rows, want):
        got, found = gradients_of(
            lambda: linear_layers(m, x, dict(m.named_parameters()))[None], [x], list(m.parameters())
        )
        torch.testing.assert_close(got, out, rtol=1e-12, atol=1e-14)
        for a, b in zip(found, grads):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
            assert a.is_contiguous()
    x = torch.stack([x.detach() for x in rows]).requires_grad_()
    params = {
        k: torch.stack([m.get_parameter(k).detach() for m in modules]).requires_grad_()
        for k, _ in modules[0].named_parameters()
    }
    got, found = gradients_of(lambda: linear_layers(modules[0], x, params), [x], list(params.values()))
    for i, (out, grads) in enumerate(want):
        torch.testing.assert_close(got[i], out[0], rtol=1e-12, atol=1e-14)
        for a, b in zip(found, grads):
            torch.testing.assert_close(a[i], b, rtol=1e-10, atol=1e-13)
            assert a.is_contiguous()  # the fused Adam does not look at strides


def test_layers_in_bf16_and_of_a_decoder():
    "As near as autocast is; and what a slot adds, with a layer that has no bias."
    torch.manual_seed(0)
    m, x = InputProjection(48, 32), torch.randn(30, 48)

    def autocast():
        with torch.autocast('cpu', torch.bfloat16):
            return m(x)[None].float()

    (out, grads), (got, found) = (
        gradients_of(f, [], list(m.parameters()))
        for f in (autocast, lambda: linear_layers(m, x, dict(m.named_parameters()), 'bf16')[None])
    )
    assert got.dtype == torch.float32 and 1e-4 < (got - m(x)).norm() / m(x).norm() < 0.02
    for a, b in zip((got, *found), (out, *grads)):
        assert (a - b).norm() / b.norm() < 0.02
    decoder, slots = shaken(AttentionDecoder(12, 10, 8), 0), torch.randn(5, 12, dtype=torch.double, requires_grad=True)
    want, got = (
        gradients_of(f, [slots], list(decoder.parameters()))
        for f in (
            lambda: decoder.per_slot(slots)[None],
            lambda: per_slot(
                decoder, slots, part_of(dict(d=1) | {f'd.{k}': p for k, p in decoder.named_parameters()}, 'd')
            )[None],
        )
    )
    for a, b in zip((got[0], *got[1]), (want[0], *want[1])):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)
    loss = linear_layers(m, x, dict(m.named_parameters())).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        loss.backward()


def test_what_is_refused():
    attention, (x, slots) = SlotAttention(12).double(), data(2)[0]
    params = dict(attention.named_parameters())
    slots_out = attend(attention, x, slots, params)[0].sum()
    slots_out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        slots_out.backward()
    with pytest.raises(SlotnbError, match='slots has shape'):
        attend(attention, x, slots[:1], params)
    with pytest.raises(SlotnbError, match='target has shape'):
        mixed_mse(torch.randn(2, 4, 10), torch.randn(2, 4, 15), torch.randn(2, 14, 10))
    loss = mixed_mse(torch.randn(2, 4, 10, requires_grad=True), torch.randn(2, 4, 15), torch.randn(2, 15, 10)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        loss.backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
def test_cuda_agrees_with_the_cpu():
    found = []
    for device in ('cpu', 'cuda'):
        torch.manual_seed(0)
        attention, decoder = (shaken(m, 0).to(device) for m in (SlotAttention(12), AttentionDecoder(12, 10, 8)))
        (x, slots), target = data(2)
        x, slots, target = (t.detach().to(device) for t in (x, slots, target))
        out, logits = attend(attention, attention.norm_inputs(x), slots, dict(attention.named_parameters()))
        mixed_mse(decoder.per_slot(out), logits, target).sum().backward()
        found.append({n: p.grad.cpu() for n, p in attention.named_parameters() if n != CANCELLED})
    for name, g in found[0].items():
        torch.testing.assert_close(found[1][name], g, rtol=1e-8, atol=1e-12, msg=name)
