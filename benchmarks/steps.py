"""A training step: the papers' code in plain PyTorch, slotnb's default engine and its fast one, from the same weights,
in turns, in one process.

One thread on a CPU, as the papers' implementations are compared. Weights are initial, features are noise."""

import copy
import torch
from measure import alternate, peak_bytes
from plain import Plain, PlainStep
from slotnb.core import has_bf16
from slotnb.losses import SlotLoss
from slotnb.model import build
from slotnb.runs.config import preset
from slotnb.train import make_optimizer, make_step

PAPERS = dict(num_slots=7, slot_dim=256, hidden_dim=1024, decoder='mlp')
SIZES = {  # rows of the table: settings, patches, batch
    'papers, batch 2': (PAPERS, 256, 2),
    'papers, 1,024 patches': (PAPERS, 1024, 2),
    'default sizes, MLP decoder': (dict(decoder='mlp'), 256, 2),
    'default model': (dict(), 256, 2),
    'default model, batch 8': (dict(), 256, 8),
    'default model, batch 16': (dict(), 256, 16),
}
TINY = {name: (dict(num_slots=3, slot_dim=16, hidden_dim=16, decoder=s.get('decoder', 'attention')), 16, 2)
        for name, (s, _, _) in SIZES.items()}  # fmt: skip
FEAT_DIM = 384


def sides_of(settings, patches, batch, device, low):
    "The step of each side as a function without arguments, on copies of the same weights."
    torch.manual_seed(0)
    config = preset('version_0_1', device=device.type, **settings)
    first = build(config, FEAT_DIM, patches)
    plain = Plain(FEAT_DIM, patches, config.slot_dim, config.decoder, config.hidden_dim, config.mask_temperature)
    plain.load_state_dict(first.state_dict())
    feats = torch.randn(batch, patches, FEAT_DIM, device=device)
    noise = torch.randn(batch, config.num_slots, config.slot_dim, device=device)
    step = PlainStep(plain.to(device), config.diversity_weight, config.clip_norm)
    sides, used = {'plain': lambda: step(feats, noise, config.lr)}, {'plain': "the papers' code, Adam as it comes"}
    for engine in ('torch', 'fast'):
        for precision in ('fp32', 'bf16') if low else ('fp32',):
            model = copy.deepcopy(first).to(device)
            c = preset('version_0_1', device=device.type, engine=engine, train_precision=precision, **settings)
            f, used[f'{engine}, {precision}'] = make_step(c, model, make_optimizer(c, model.parameters()))
            sides[f'{engine}, {precision}'] = lambda f=f: f(feats, noise)
    return sides, used, (plain, first, feats, noise)


def largest_gap(plain, first, feats, noise):
    "Relative difference of all gradients of the default model's code from the plain code's."

    def gradients(model, loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])

    first = copy.deepcopy(first).to(feats.device)
    want = gradients(plain, ((plain(feats, noise)[0] - feats) ** 2).mean())
    got = gradients(first, SlotLoss(0.0)(first(feats, noise))['mse'])
    return ((got - want).norm() / want.norm()).item()


def bench_steps(small=False, device='cpu', seconds=12, progress=lambda text: None):
    "One row per size: seconds, speed-up over plain, peak memory."
    device, rows = torch.device(device), []
    low = small or has_bf16(device)
    torch.set_num_threads(1)
    for name, (settings, patches, batch) in (TINY if small else SIZES).items():
        progress(name)
        sides, used, models = sides_of(settings, patches, batch, device, low)
        gap = largest_gap(*models)
        assert gap < 1e-4, (name, gap)
        memory = {side: peak_bytes(f, device) for side, f in sides.items()}
        once = alternate(sides, 1, device)
        repeats = 1 if small else max(3, min(31, round(seconds / sum(s['median'] for s in once.values()))))
        rows.append(
            dict(
                size=name,
                settings=settings,
                patches=patches,
                batch=batch,
                used=used,
                step=alternate(sides, repeats, device),
                peak_bytes=memory,
                gradient_gap=gap,
            )
        )
    return dict(threads=1, bf16=low, rows=rows)
