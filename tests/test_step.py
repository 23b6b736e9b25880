"One step of training: blocks against autograd, both decoders against the plain reference of the benchmarks, what a CUDA graph needs."

import copy, sys
import pytest, torch
from conftest import ROOT
from slotnb.core import SlotnbError
from slotnb.decoder import MLPDecoder
from slotnb.losses import feature_mse
from slotnb.model import SlotAutoencoder
from slotnb.fast.graphs import GraphedStep
from slotnb.train import TrainStep, make_optimizer
from slotnb.fast.blocks import blocked_mse, step_losses

sys.path.insert(0, str(ROOT / 'benchmarks'))
from plain import Plain, PlainStep


def gradients(loss, decoder, slots):
    slots.grad = None
    decoder.zero_grad()
    loss.backward()
    return dict(slots=slots.grad.clone(), **{k: p.grad.clone() for k, p in decoder.named_parameters()})


@pytest.mark.parametrize('b,k,n,block_rows', [(1, 2, 1, 1), (2, 7, 30, 100), (3, 5, 17, 16), (2, 4, 64, 10**6)])
def test_blocks_are_exact(b, k, n, block_rows):
    "In double precision, whatever the block, the last one smaller; also with something behind the loss."
    torch.manual_seed(0)
    decoder = MLPDecoder(16, 24, n, 40, mask_temperature=0.7).double()
    slots, target = (
        torch.randn(b, k, 16, dtype=torch.double, requires_grad=True),
        torch.randn(b, n, 24, dtype=torch.double),
    )
    want, got = feature_mse(decoder(slots).recon, target), blocked_mse(decoder, slots, target, block_rows=block_rows)
    assert got.item() == pytest.approx(want.item(), rel=1e-13)
    want, got = gradients(3 * want, decoder, slots), gradients(3 * got, decoder, slots)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-15, msg=name)


def test_blocks_keep_little():
    "What waits for the backward pass does not grow with slots x patches."

    def kept(f):
        sizes = {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            f()
        return sum(sizes.values())

    slots = torch.randn(2, 7, 16, requires_grad=True)
    sizes = {}
    for n in (64, 256):
        decoder, target = MLPDecoder(16, 24, n, 64), torch.randn(2, n, 24)
        sizes[n] = (
            kept(lambda: feature_mse(decoder(slots).recon, target)),
            kept(lambda: blocked_mse(decoder, slots, target)),
        )
    assert sizes[256][0] - sizes[64][0] > 10 * (sizes[256][1] - sizes[64][1]) and sizes[256][1] < sizes[256][0] / 4


def test_gradients_are_handed_out_once():
    decoder, slots = MLPDecoder(8, 8, 4, 8), torch.randn(1, 2, 8, requires_grad=True)
    loss = blocked_mse(decoder, slots, torch.randn(1, 4, 8))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match='twice'):
        loss.backward()


def test_shapes_are_refused():
    decoder = MLPDecoder(8, 8, 4, 8)
    with pytest.raises(SlotnbError, match='target has shape'):
        blocked_mse(decoder, torch.randn(1, 2, 8), torch.randn(1, 5, 8))
    with pytest.raises(SlotnbError, match='slots has shape'):
        blocked_mse(decoder, torch.randn(2, 8), torch.randn(1, 4, 8))


@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
def test_trains_as_the_plain_reference(decoder):
    "Ten steps of the code that the benchmark compares with, in double precision: losses, gradient norms and weights."
    torch.manual_seed(0)
    ours = SlotAutoencoder(24, 20, 4, 16, decoder=decoder, hidden_dim=32, mask_temperature=0.5).double()
    plain = Plain(24, 20, 16, decoder, 32, 0.5).double()
    plain.load_state_dict(ours.state_dict())
    a, b = TrainStep(ours, make_optimizer(ours.parameters(), 1e-3), 0.1, 1.0), PlainStep(plain, 0.1, 1.0)
    for i in range(10):
        x, noise = torch.randn(2, 20, 24, dtype=torch.double), torch.randn(2, 4, 16, dtype=torch.double)
        torch.testing.assert_close(a(x, noise, 1e-3 / (i + 1)), b(x, noise, 1e-3 / (i + 1)), rtol=1e-8, atol=1e-10)
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=name)


@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
def test_bf16_is_near_and_other(decoder):
    "Off by what eight bits allow, and really computed in them."
    torch.manual_seed(0)
    model, x, noise = (
        SlotAutoencoder(48, 30, 5, 32, decoder=decoder, hidden_dim=64),
        torch.randn(2, 30, 48),
        torch.randn(2, 5, 32),
    )
    found = {}
    for precision in ('fp32', 'bf16'):
        model.zero_grad()
        losses = step_losses(model, x, noise, 0.1, precision)
        losses.loss.backward()
        found[precision] = losses.loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])
    (l32, g32), (l16, g16) = found.values()
    assert l16 == pytest.approx(l32, rel=1e-2) and l16 != l32
    assert 1e-4 < (g16 - g32).norm() / g32.norm() < 0.05
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_a_graphed_step_is_the_function_itself_on_the_cpu():
    seen = []
    step = GraphedStep(lambda x, y: seen.append((x, y)) or x + y, torch.device('cpu'))
    x, y = torch.ones(2), torch.ones(2)
    assert step(x, y).tolist() == [2, 2] and seen[0][0] is x and not step.graphs


cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


@cuda
@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_graph_trains_as_the_step_itself(decoder, precision):
    "Twenty steps, two batch sizes, a learning rate that changes: recorded and not, the same losses and weights."
    torch.manual_seed(0)
    first = SlotAutoencoder(48, 30, 5, 32, decoder=decoder, hidden_dim=64).cuda()
    steps = []
    for warmup in (3, 10**6):  # the second is never recorded
        model = copy.deepcopy(first)
        steps.append(TrainStep(model, make_optimizer(model.parameters(), 1e-3), 0.1, 1.0, precision))
        steps[-1].graphed.warmup = warmup
    for i in range(20):
        b = 2 if i % 4 else 1
        x, noise = torch.randn(b, 30, 48, device='cuda'), torch.randn(b, 5, 32)
        a, c = (s(x, noise, 1e-3 / (i + 1)).clone() for s in steps)
        torch.testing.assert_close(a, c, rtol=1e-4 if precision == 'fp32' else 2e-2, atol=1e-5)
    assert len(steps[0].graphed.graphs) == 2 and not steps[1].graphed.graphs
    if precision == 'fp32':
        for p, q in zip(steps[0].model.parameters(), steps[1].model.parameters()):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@cuda
def test_blocks_on_cuda_agree_with_the_cpu():
    decoder, slots, target = (
        MLPDecoder(16, 24, 30, 40),
        torch.randn(2, 5, 16, requires_grad=True),
        torch.randn(2, 30, 24),
    )
    want = gradients(blocked_mse(decoder, slots, target), decoder, slots)
    other = copy.deepcopy(decoder).cuda()
    moved = slots.detach().cuda().requires_grad_()
    got = gradients(blocked_mse(other, moved, target.cuda()), other, moved)
    for name in want:
        torch.testing.assert_close(got[name].cpu(), want[name], rtol=1e-3, atol=1e-6, msg=name)
