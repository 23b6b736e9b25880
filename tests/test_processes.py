"""Several processes train as one does: the same losses, whatever the batch and the loss."""

import os
import socket
import subprocess
import sys
import pytest
import torch
from conftest import ROOT
from slotnb.core import SlotnbError
from slotnb.losses import SlotLoss
from slotnb.model import build
from slotnb.runs.batch_size import InParts
from slotnb.runs.config import TrainConfig
from slotnb.train import lr_at, make_optimizer, make_step, train_step

# 34 epochs of 11 images in batches of 5, 5 and 1: 102 steps
TRAIN = """
import sys, torch
from slotnb.processes import joined
from slotnb.runs.config import TrainConfig
from slotnb.train import make_optimizer, make_step, train_epoch
from slotnb.video.batches import ClipFeatures
from slotnb.video.model import build_model

with joined('cpu') as is_first:
    small = dict(num_slots=4, slot_dim=16, batch_size=5, num_epochs=34)
    config = TrainConfig(**small | eval(sys.argv[1]))
    feats = torch.randn(33, 16, 8, generator=torch.Generator().manual_seed(0))
    feats = ClipFeatures(feats, torch.arange(33).view(11, 3)) if config.mode == 'video' else feats[:11]
    model, losses = build_model(config, 8, (4, 4)), []
    opt = make_optimizer(config, model.parameters())
    step, engine = make_step(config, model, opt)

    def kept(*args):
        terms = step(*args)
        losses.append(terms['loss'].item())
        return terms

    for epoch in range(config.num_epochs):
        train_epoch(kept, model, opt, feats, config, epoch)
    if is_first:
        print(dict(engine=engine, losses=losses))
"""


class SlotsAlone:
    "A loss that needs nothing of the decoder, whose parameters then get no gradient."

    def __call__(self, out):
        return (out.slots - 1).square().mean()


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def train(n, **settings):
    "What the first of n processes prints; they are started as `torchrun` starts them."
    shared = dict(OMP_NUM_THREADS='1', MASTER_ADDR='localhost', MASTER_PORT=str(free_port()), WORLD_SIZE=str(n))
    shared |= dict(TORCHELASTIC_RUN_ID='test', LOCAL_WORLD_SIZE=str(n)) if n > 1 else {}
    command = [sys.executable, '-c', TRAIN, repr(settings)]
    started = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=os.environ | shared | dict(RANK=str(i), LOCAL_RANK=str(i))
        )
        for i in range(n)
    ]
    said = [p.communicate()[0] for p in started]
    assert [p.returncode for p in started] == [0] * n and not any(said[1:])
    return eval(said[0])


def check_equal(n, **settings):
    one, several = train(1, **settings), train(n, **settings)
    assert one['engine'] == 'torch, fp32' and several['engine'].endswith(f'{n} processes')
    assert len(one['losses']) == 102 and one['losses'][-2] < one['losses'][0]
    worst = max(abs(a - b) for a, b in zip(one['losses'], several['losses']))
    assert worst < 1e-5, worst


def test_two_processes_have_the_losses_of_one():
    check_equal(2)


@pytest.mark.parametrize('size', [1, 4, 20])
@pytest.mark.parametrize('loss', [SlotLoss(0.1), lambda out: out.slots.mean(1).square().sum(-1).logsumexp(0)])
def test_a_batch_in_parts_gives_the_step_of_the_whole(size, loss):
    config = TrainConfig(num_slots=4, slot_dim=16)
    feats, found = torch.randn(10, 16, 8), []
    for part in (None, size):
        model = build(config, 8, (4, 4))
        noise = model.init.draw(10, torch.Generator().manual_seed(1))
        opt = make_optimizer(config, model.parameters())
        terms = train_step(InParts(model, part) if part else model, loss, opt, feats, noise)
        found.append((terms, [p.grad for p in model.parameters()]))
    torch.testing.assert_close(*found)


def test_the_engine_says_how_a_batch_is_computed():
    config = TrainConfig(num_slots=4, slot_dim=16, micro_batch=2)
    model = build(config, 8, (4, 4))
    assert make_step(config, model, make_optimizer(config, model.parameters()))[1] == 'torch, fp32, 2 images at a time'


def test_compile_needs_a_compiler(monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    config = TrainConfig(num_slots=4, slot_dim=16, compile=True, device='cpu')
    model = build(config, 8, (4, 4))
    with pytest.raises(SlotnbError, match='no-such-compiler, which is missing'):
        make_step(config, model, make_optimizer(config, model.parameters()))


@pytest.mark.parametrize('rule, peak', [('none', 0.002), ('sqrt', 0.004), ('linear', 0.008)])
def test_the_rule_of_the_learning_rate_and_a_warm_up_in_images(rule, peak):
    config = TrainConfig(batch_size=32, lr_rule=rule, warmup_samples=100, num_epochs=10)
    rates = [lr_at(i, 20, config) for i in range(200)]
    assert rates.index(max(rates)) == 3 and max(rates) == pytest.approx(peak)  # the fourth step ends at 128 images


def test_only_training_runs_by_torchrun():
    launched = dict(TORCHELASTIC_RUN_ID='test', WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', LOCAL_WORLD_SIZE='2')
    done = [
        subprocess.run(
            [sys.executable, '-m', 'slotnb', 'sweep'],
            env=os.environ | launched | dict(RANK=rank),
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
        for rank in '01'
    ]
    assert [d.returncode for d in done] == [2, 2] and not done[1].stderr + done[1].stdout
    assert done[0].stderr == 'slotnb: torchrun is for slotnb train; start slotnb sweep without it\n'
