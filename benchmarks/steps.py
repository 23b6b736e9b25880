"""A step of training and a forward pass: slotnb against the same equations written plainly, both from the same weights, in turns, in one process.

Called by run.py. FLOPs are those of whole matrix products; share_of_peak is what is left of the fastest matrix product measured in the same minute, and above 1 where products with zeros
are left out (`fast/cpu`). One thread, unless a row says otherwise. Weights are drawn and features are noise, but in the row that says otherwise.
"""

import contextlib, copy, json, os, shutil, subprocess, sys, time
from unittest.mock import patch
import torch
from measure import ENERGY, alternate, flops, gemm_peak, joules, peak_bytes, precisions
from plain import Plain, PlainStep
from quality import DATA
from slotnb.model import SlotAutoencoder
from slotnb.normalizer import Normalizer
from slotnb.rounds import rounds_obstacle
from slotnb.train import TrainStep, make_optimizer
from slotnb.fast.blocks import step_losses
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import prepare
from slotnb.fast.many_models import KEEP_MEMORY

PAPERS = dict(slots=7, slot_dim=256, patches=256, hidden=1024, batch=2, decoder='mlp')
SIZES = {  # one a row of the table
    'papers, batch 2': PAPERS,
    'papers, batch 16': PAPERS | dict(batch=16),
    'papers, 1,024 patches (448 px)': PAPERS | dict(patches=1024),
    'papers, 24 slots': PAPERS | dict(slots=24),
    'default sizes, MLP decoder': dict(slots=11, slot_dim=128, patches=256, hidden=512, batch=2, decoder='mlp'),
    'default model': dict(slots=11, slot_dim=128, patches=256, hidden=512, batch=2, decoder='attention'),
    'default model, batch 16': dict(slots=11, slot_dim=128, patches=256, hidden=512, batch=16, decoder='attention'),
    'MLP decoder, narrow': dict(
        slots=7, slot_dim=64, patches=256, hidden=64, batch=2, decoder='mlp'
    ),  # which quality.py trains
    'papers, batch 2, all cores': PAPERS | dict(threads=os.cpu_count()),
    'default model, all cores': dict(
        slots=11, slot_dim=128, patches=256, hidden=512, batch=2, decoder='attention', threads=os.cpu_count()
    ),
}
AFTER_TRAINING = (
    'papers, batch 2, after training',
    PAPERS | dict(trained=135),
)  # steps on DINOv2's features of the committed scenes, five epochs: what a training meets, not a beginning
FEAT_DIM, LR, DIVERSITY, CLIP, TEMPERATURE = 384, 4e-4, 0.1, 1.0, 0.5


def models(slots, slot_dim, patches, hidden, batch, decoder, threads=1, trained=0):
    "Both sides' models with the same weights, and data for a step; both of a training that is `trained` steps old."
    torch.manual_seed(0)
    ours = SlotAutoencoder(
        FEAT_DIM, patches, slots, slot_dim, decoder=decoder, hidden_dim=hidden, mask_temperature=TEMPERATURE
    )
    plain = Plain(FEAT_DIM, patches, slot_dim, decoder, hidden, TEMPERATURE)
    feats, noise = torch.randn(batch, patches, FEAT_DIM), torch.randn(batch, slots, slot_dim)
    if trained:
        config = TrainConfig(device='cpu', data_dir=DATA)
        scenes, step = (
            Normalizer(config.normalizer)(prepare(config, False).train[:])[:, :patches],
            TrainStep(ours, make_optimizer(ours.parameters(), LR), DIVERSITY, CLIP),
        )
        for _ in range(trained):
            feats = scenes[torch.randperm(len(scenes))[:batch]]
            step(feats, torch.randn_like(noise), LR)
        ours.zero_grad()
    plain.load_state_dict(ours.state_dict())
    return plain, ours, feats, noise


def gradient_gaps(plain, ours, feats, noise, names):
    "Relative difference of all gradients together, and of the loss, before anything has learnt; in each precision named."

    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        found = torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])
        model.zero_grad()
        return found, loss.item()

    want, loss = gradients(plain, ((plain(feats, noise)[0] - feats) ** 2).mean())
    got = {p: gradients(ours, step_losses(ours, feats, noise, 0.0, p).mse) for p in names}
    return {
        p: dict(gradients=((g - want).norm() / want.norm()).item(), loss=abs(l / loss - 1)) for p, (g, l) in got.items()
    }


def step_sides(plain, ours, feats, noise, names=('fp32',)):
    "The step of each side, on copies, so that each trains a model of its own; slotnb's in each precision named."
    sides = {'plain': PlainStep(copy.deepcopy(plain), DIVERSITY, CLIP)}
    for precision in names:
        model = copy.deepcopy(ours)
        sides[precision] = TrainStep(model, make_optimizer(model.parameters(), LR), DIVERSITY, CLIP, precision)
    return {name: lambda s=s: s(feats, noise, LR) for name, s in sides.items()}


def ours_forward(model, feats, noise):
    "What `model(feats)` does, with the noise given."
    slots, _, logits = model.slot_attention(model.project(feats), model.init(noise))
    return model.decoder(slots, logits)


def as_calls(f):
    "`f` without what is compiled: torch's counter of operations does not see those of `panels`, `tiles`, `rounds` and `products`."

    def run():
        with contextlib.ExitStack() as out:
            for name in ('step.panels', 'step.tiles', 'backward.rounds', 'products.outer'):
                out.enter_context(patch(f'slotnb.{name}_obstacle', lambda *a: 'left out'))
            return f()

    return run


def energy_of(f):
    "Joules of one call, where they can be read."
    if not ENERGY:
        return None
    before = joules()
    f()
    after = joules()
    return None if before is None else after - before


def bench_size(name, size, seconds, peak):
    "One row: step, forward pass, memory, operations; in the precisions that have a peak. The sides take 3 to 31 turns, as many as would take `seconds` at the peak."
    torch.set_num_threads(size.get('threads', 1))
    plain, ours, feats, noise = models(**size)
    gaps = gradient_gaps(plain, ours, feats, noise, peak)
    assert all(gap['gradients'] < dict(fp32=1e-4, bf16=0.1)[p] for p, gap in gaps.items()), gaps
    sides = step_sides(plain, ours, feats, noise, peak)
    memory, count, energy = (
        {n: look(f) for n, f in sides.items()} for look in (peak_bytes, lambda f: flops(as_calls(f)), energy_of)
    )  # the first of these calls makes Adam's moments
    at_peak = {n: count[n] / peak['bf16' if n == 'bf16' else 'fp32'] for n in sides}  # seconds of one thread
    repeats = min(31, max(3, round(seconds / sum(at_peak.values()))))
    step = alternate(sides, repeats, warm=True)
    with torch.no_grad():
        forward = alternate(
            {'plain': lambda: plain(feats, noise), 'fp32': lambda: ours_forward(ours, feats, noise)}, repeats, warm=True
        )
    share = {n: at_peak[n] / step[n]['median'] / torch.get_num_threads() for n in sides}
    persistent = 4 * sum(p.nbytes for p in plain.parameters())  # weights, gradients, two moments
    return dict(
        size=name,
        **{'threads': 1} | size,
        step=step,
        forward=forward,
        peak_bytes=memory,
        flops=count,
        share_of_peak=share,
        joules=energy,
        gaps=gaps,
        weights_gradients_moments=persistent,
    )


def eager_step(model, opt, low=False, compiled=False):
    "slotnb's model as it stands, differentiated by autograd."

    def loss_of(x, noise):
        with torch.autocast('cpu', torch.bfloat16, enabled=low):
            recon = ours_forward(model, x, noise).recon
        return torch.nn.functional.mse_loss(recon.float(), x)

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step(x, noise):
        loss = loss_of(x, noise)
        opt.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        opt.step()

    return step


def freed_memory_kept(size, repeats):
    "Both sides in a process whose allocator keeps what was freed; that can only be set at its start."
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([size, repeats, torch.get_num_threads()])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env=os.environ | KEEP_MEMORY,
    )
    return json.loads(done.stdout.splitlines()[-1])


def bench_ideas(repeats, size, names, compiled):
    "One idea at a time, at one size: which paid? Half a minute of torch.compile, where it is asked for."
    plain, ours, feats, noise = models(**size)
    adams = dict(loop=lambda p: torch.optim.Adam(p), fused=lambda p: make_optimizer(p, LR))

    def eager(kind, **kw):
        m = copy.deepcopy(ours)
        f = eager_step(m, adams[kind](m.parameters()), **kw)
        return lambda: f(feats, noise)

    ours_sides = step_sides(plain, ours, feats, noise, names)
    sides = {'plain': ours_sides['plain'], 'the exact savings': eager('loop'), '+ Adam in one kernel': eager('fused')}
    if 'bf16' in names:
        sides['+ bf16 by autocast'] = eager('fused', low=True)
    start = time.perf_counter()
    if compiled and shutil.which('g++'):
        sides['+ torch.compile'] = eager('fused', compiled=True)
        sides['+ torch.compile']()
    seconds = time.perf_counter() - start
    for name in names:
        sides[f'written out, {name}'] = as_calls(ours_sides[name])
    if not rounds_obstacle(feats, 256):
        for name in names:
            sides[f'+ compiled (slotnb, {name})'] = ours_sides[name]
    times = alternate(sides, repeats)
    kept = {
        f'{n}, freed memory kept': v | dict(ratio=dict(median=times['plain']['median'] / v['median']))
        for n, v in freed_memory_kept(size, repeats).items()
    }
    return dict(size=size, times=times | kept, seconds_to_compile=seconds if '+ torch.compile' in sides else None)


def bench_steps(seconds=8, sizes=SIZES, later=AFTER_TRAINING, progress=lambda text: None, small=False):
    torch.set_num_threads(1)  # as the papers' implementations are compared; rows for all cores say so
    names, rows = precisions(small), []
    peak = gemm_peak(names)
    for name, size in (*sizes.items(), later):
        progress(name)
        rows.append(bench_size(name, size, seconds, peak))
    progress('ideas one by one')
    torch.set_num_threads(1)
    ideas = {
        n: bench_ideas(3, sizes[n], names, compiled=n == 'default model' and not small)
        for n in (next(iter(sizes)), 'default model')
    }
    return dict(gemm_peak=peak, rows=rows, ideas=ideas)


if __name__ == '__main__':  # of freed_memory_kept
    size, repeats, threads = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    sides = step_sides(*models(**size))
    print(json.dumps(alternate({'plain': sides['plain'], 'slotnb, fp32': sides['fp32']}, repeats)))
