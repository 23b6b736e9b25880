"""The one door for speed: the fast step computes what the plain one does, is used for built-in parts only, and can be
deleted."""

import copy
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
import pandas as pd
import pytest
import torch
from conftest import ROOT, copy_scenes, saved_bytes
from slotnb.decoder import AttentionDecoder, MLPDecoder
from slotnb.fast.blocks import blocked_mse
from slotnb.fast.step import fast_losses, fast_step, why_unsupported
from slotnb.losses import SlotLoss, feature_mse
from slotnb.model import SlotAutoencoder, build
from slotnb.runs.config import preset
from slotnb.slot_attention import SlotAttention
from slotnb.train import fit, lr_at, make_optimizer, make_step, set_lr, train_step

sys.path.insert(0, str(ROOT / 'benchmarks'))
from plain import Plain, PlainStep

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


def gradients(loss, decoder, slots):
    slots.grad = None
    decoder.zero_grad()
    loss.backward()
    return dict(slots=slots.grad.clone(), **{k: p.grad.clone() for k, p in decoder.named_parameters()})


@pytest.mark.parametrize('b,k,n,block_rows', [(1, 2, 1, 1), (2, 7, 30, 100), (3, 5, 17, 16), (2, 4, 64, 10**6)])
def test_blocks_are_exact(b, k, n, block_rows):
    "In double precision, for any block, a smaller last one, and with something behind the loss."
    decoder = MLPDecoder(16, 24, n, 40, mask_temperature=0.7).double()
    slots = torch.randn(b, k, 16, dtype=torch.double, requires_grad=True)
    target = torch.randn(b, n, 24, dtype=torch.double)
    want = feature_mse(decoder(slots).recon, target)
    got = blocked_mse(decoder, slots, target, block_rows=block_rows)
    assert got.item() == pytest.approx(want.item(), rel=1e-13)
    want, got = gradients(3 * want, decoder, slots), gradients(3 * got, decoder, slots)
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-10, atol=1e-15, msg=name)


def test_blocks_keep_little():
    "What waits for the backward pass does not grow with slots x patches."
    slots, sizes = torch.randn(2, 7, 16, requires_grad=True), {}
    for n in (64, 256):
        decoder, target = MLPDecoder(16, 24, n, 64), torch.randn(2, n, 24)
        plain = saved_bytes(lambda: feature_mse(decoder(slots).recon, target))
        sizes[n] = plain, saved_bytes(lambda: blocked_mse(decoder, slots, target))
    assert sizes[256][0] - sizes[64][0] > 10 * (sizes[256][1] - sizes[64][1])
    assert sizes[256][1] < sizes[256][0] / 4


def test_blocks_can_be_differentiated_twice_over():
    "Like any other loss: with retain_graph the second backward pass gives the same gradients."
    decoder, slots = MLPDecoder(8, 8, 4, 8), torch.randn(1, 2, 8, requires_grad=True)
    loss = blocked_mse(decoder, slots, torch.randn(1, 4, 8))
    loss.backward(retain_graph=True)
    first = slots.grad.clone()
    loss.backward()
    torch.testing.assert_close(slots.grad, 2 * first)


def test_blocks_refuse_shapes():
    from slotnb.core import SlotnbError

    decoder = MLPDecoder(8, 8, 4, 8)
    with pytest.raises(SlotnbError, match='target has shape'):
        blocked_mse(decoder, torch.randn(1, 2, 8), torch.randn(1, 5, 8))
    with pytest.raises(SlotnbError, match='slots has shape'):
        blocked_mse(decoder, torch.randn(2, 8), torch.randn(1, 4, 8))


@pytest.mark.parametrize('engine', ['torch', 'fast'])
@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
def test_trains_as_the_plain_reference(decoder, engine):
    "Ten steps of the code that the benchmark compares with, in double precision: losses, gradient norms and weights."
    config = preset('version_0_1', num_slots=4, slot_dim=16, decoder=decoder, hidden_dim=32, engine=engine, lr=1e-3)
    ours = build(config, 24, 20).double()
    plain = Plain(24, 20, 16, decoder, 32, 0.5).double()
    plain.load_state_dict(ours.state_dict())
    opt = make_optimizer(config, ours.parameters())
    (a, _), b = make_step(config, ours, opt), PlainStep(plain, 0.1, 1.0)
    for i in range(10):
        x, noise = torch.randn(2, 20, 24, dtype=torch.double), torch.randn(2, 4, 16, dtype=torch.double)
        set_lr(opt, 1e-3 / (i + 1))
        torch.testing.assert_close(
            torch.stack(list(a(x, noise).values())), b(x, noise, 1e-3 / (i + 1)), rtol=1e-8, atol=1e-10
        )
    for (name, p), q in zip(ours.named_parameters(), plain.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8, msg=name)


def fifty_steps(decoder, engine, rounding=0.0):
    "(50 4) losses and gradient norms. `rounding` changes every initial weight by about so much, relative to it."
    torch.manual_seed(0)
    config = preset('version_0_1', num_slots=5, slot_dim=64, decoder=decoder, hidden_dim=64, engine=engine)
    model = build(config, 64, 36)
    with torch.no_grad():
        for p in model.parameters():
            p *= 1 + rounding * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    opt = make_optimizer(config, model.parameters())
    step, used = make_step(config, model, opt)
    assert used.startswith(engine)
    rows = []
    for i in range(50):
        set_lr(opt, lr_at(i, 10, config))
        x, noise = torch.randn(2, 36, 64), torch.randn(2, 5, 64)
        rows.append(torch.stack(list(step(x, noise).values())))
    return torch.stack(rows)


@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
def test_fifty_steps_agree(decoder):
    """In single precision, at widths that the compiled code takes: losses of both engines to float tolerance.

    An activation on the kink of a ReLU goes either way with the last bit, and the runs part there. So the fast engine
    has to agree with one of three plain runs whose weights differ by roundings; the first ten steps agree with all.
    """
    fast = fifty_steps(decoder, 'fast')
    plain = [fifty_steps(decoder, 'torch', rounding) for rounding in (0.0, 6e-8, 1.2e-7)]
    for other in plain:
        torch.testing.assert_close(fast[:10, :3], other[:10, :3], rtol=1e-5, atol=1e-6)
    nearest = min(plain, key=lambda other: (other - fast)[:, :3].abs().max())
    torch.testing.assert_close(fast[:, :3], nearest[:, :3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fast[:, 3], nearest[:, 3], rtol=1e-2, atol=0)


@pytest.mark.parametrize('engine', ['torch', 'fast'])
@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
def test_bf16_is_close_and_different(decoder, engine):
    "Off by what eight bits of mantissa allow, really computed in them, weights in single precision."
    torch.manual_seed(0)
    first = SlotAutoencoder(48, 30, 5, 32, decoder=decoder, hidden_dim=64)
    x, noise, found = torch.randn(2, 30, 48), torch.randn(2, 5, 32), {}
    for precision in ('fp32', 'bf16'):
        model = copy.deepcopy(first)
        opt = torch.optim.SGD(model.parameters(), lr=0.0)
        if engine == 'torch':
            terms = train_step(model, SlotLoss(0.1), opt, x, noise, 1e9, precision)
        else:
            terms = fast_step(None, model, SlotLoss(0.1), opt, 1e9, precision)[0](x, noise)
        found[precision] = terms['loss'].item(), torch.cat([p.grad.flatten() for p in model.parameters()])
        assert all(p.dtype == torch.float32 for p in model.parameters())
    (l32, g32), (l16, g16) = found.values()
    assert l16 == pytest.approx(l32, rel=1e-2) and l16 != l32
    assert 1e-4 < (g16 - g32).norm() / g32.norm() < 0.08


class OtherAttention(SlotAttention): ...


class OtherDecoder(AttentionDecoder): ...


class OtherLoss(SlotLoss): ...


@pytest.mark.parametrize(
    'setting, cls', [('slot_attention', OtherAttention), ('decoder', OtherDecoder), ('loss', OtherLoss)]
)
def test_only_built_in_parts_are_fast(setting, cls, tmp_path, few_scenes):
    "A subclass trains with the plain step, and config.json and result.json say why."
    config = preset(
        'version_0_1',
        data_dir=str(few_scenes),
        num_epochs=1,
        warmup_epochs=0,
        slot_dim=16,
        hidden_dim=16,
        num_slots=3,
        device='cpu',
        engine='fast',
        save_dir=str(tmp_path / 'fast'),
        **{setting: f'test_fast:{cls.__name__}'},
    )
    folder = fit(config, show_progress=False)
    (used,) = json.loads((folder / 'config.json').read_text())['trained_with']
    assert used.startswith('torch, fp32') and f'{setting} is {cls.__name__}' in used
    plain = fit(replace(config, engine='torch', save_dir=str(tmp_path / 'torch')), show_progress=False)
    assert (folder / 'metrics.csv').read_bytes() == (plain / 'metrics.csv').read_bytes()


def test_fast_is_asked_for(tmp_path, few_scenes):
    "The default engine is torch, whatever the machine has; fast is recorded with what it used."
    config = preset(
        'version_0_1', data_dir=str(few_scenes), num_epochs=2, warmup_epochs=0, slot_dim=64, hidden_dim=64, device='cpu'
    )
    rows = {}
    for engine in ('torch', 'fast'):
        folder = fit(replace(config, engine=engine, save_dir=str(tmp_path / engine)), show_progress=False)
        (used,) = json.loads((folder / 'config.json').read_text())['trained_with']
        assert used.startswith(engine)
        rows[engine] = pd.read_csv(folder / 'metrics.csv')
    pd.testing.assert_frame_equal(rows['torch'], rows['fast'], rtol=1e-2, atol=1e-3)


def test_everything_else_works_without_the_folder(tmp_path):
    "A copy of the package without `fast`: the command line trains; engine fast is refused in one sentence."
    shutil.copytree(ROOT / 'slotnb', tmp_path / 'slotnb', ignore=shutil.ignore_patterns('fast', '__pycache__'))
    data = copy_scenes(tmp_path / 'data', train=6, test=2)
    args = f'train --data_dir {data} --num_epochs 1 --warmup_epochs 0 --slot_dim 16 --hidden_dim 16 --device cpu'
    # an editable installation finds the folder in the checkout, so its finder is removed
    run = 'import sys; sys.meta_path[:] = [f for f in sys.meta_path if "ditable" not in str(f)]; '
    run += 'from slotnb.cli import main; sys.exit(main(sys.argv[1:]))'
    env = os.environ | dict(PYTHONPATH=str(tmp_path))
    for engine, code in (('torch', 0), ('fast', 2)):
        command = [sys.executable, '-c', run, *args.split(), '--engine', engine, '--save_dir', str(tmp_path / engine)]
        done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    assert 'needs the subpackage slotnb.fast' in done.stderr and 'Traceback' not in done.stderr


def test_the_door_is_the_only_one():
    "Only `slotnb/fast` knows of compilers, ctypes and custom operators, and nothing imports it at import time."
    for path in (ROOT / 'slotnb').rglob('*.py'):
        text = path.read_text()
        if 'fast' in path.parts or path.name == '_modidx.py':
            continue
        assert not [w for w in ('ctypes', 'custom_op', '-march', 'g++', 'get_cpu_capability') if w in text], path
        top = [line for line in text.splitlines() if line.startswith(('from .fast', 'from slotnb.fast', 'from ..fast'))]
        assert not top, path


@cuda
@pytest.mark.parametrize('decoder', ['attention', 'mlp'])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_a_graph_trains_as_the_step_itself(decoder, precision):
    "Twenty steps, two batch sizes, a learning rate that changes: recorded or not, the same losses and weights."
    first = SlotAutoencoder(48, 30, 5, 32, decoder=decoder, hidden_dim=64).cuda()
    sides = []
    for warmup in (3, 10**6):  # the second is never recorded
        model = copy.deepcopy(first)
        opt = torch.optim.Adam(model.parameters(), 1e-3, fused=True)
        step, _ = fast_step(None, model, SlotLoss(), opt, 1.0, precision)
        step.warmup = warmup
        sides.append((model, opt, step))
    for i in range(20):
        b = 2 if i % 4 else 1
        x, noise, losses = torch.randn(b, 30, 48, device='cuda'), torch.randn(b, 5, 32), []
        for _, opt, step in sides:
            set_lr(opt, 1e-3 / (i + 1))
            losses.append(step(x, noise)['loss'].clone())
        torch.testing.assert_close(*losses, rtol=1e-4 if precision == 'fp32' else 2e-2, atol=1e-5)
    assert len(sides[0][2].graphs) == 2 and not sides[1][2].graphs


@cuda
def test_fast_losses_on_cuda_agree_with_the_cpu():
    model = SlotAutoencoder(48, 30, 5, 32, decoder='mlp', hidden_dim=64)
    x, noise = torch.randn(2, 30, 48), torch.randn(2, 5, 32)
    want = fast_losses(model, SlotLoss(), x, noise)
    got = fast_losses(copy.deepcopy(model).cuda(), SlotLoss(), x.cuda(), noise.cuda())
    for name in want:
        torch.testing.assert_close(got[name].cpu(), want[name], rtol=1e-3, atol=1e-6)
    assert why_unsupported(model, SlotLoss()) == ''
