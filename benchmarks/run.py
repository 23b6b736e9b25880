"""Speed, measured: both sides alternate in one process, and the ratio of the medians is what counts.

python benchmarks/run.py [--repeats 15] [--out benchmarks/result.json]
"""
import argparse, json, platform, statistics, time
from pathlib import Path
import torch
from torch import nn
from slotnb.decoder import MLPDecoder
from slotnb.train import TrainConfig, build, train_epoch


class PlainMLPDecoder(nn.Module):
    "The MLP broadcast decoder as the papers write it: every layer on slots x patches."
    def __init__(self, slot_dim, feat_dim, num_patches, hidden_dim, mask_temperature):
        super().__init__()
        self.pos, self.mask_temperature = nn.Parameter(torch.randn(num_patches, slot_dim)*.02), mask_temperature
        self.first, self.hidden = nn.Linear(slot_dim, hidden_dim), nn.ModuleList(nn.Linear(hidden_dim, hidden_dim) for _ in range(2))
        self.to_feats, self.to_alpha = nn.Linear(hidden_dim, feat_dim), nn.Linear(hidden_dim, 1)

    def forward(self, slots):
        h = self.first(slots[:, :, None] + self.pos).relu()
        for layer in self.hidden: h = layer(h).relu()
        masks = (self.to_alpha(h)/self.mask_temperature).softmax(1)
        return (masks*self.to_feats(h)).sum(1)


def alternate(sides, repeats):
    "Median seconds of each side; they take turns, so that a slow minute hits both."
    for f in sides.values(): f()
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, f in sides.items(): start = time.perf_counter(); f(); times[name].append(time.perf_counter() - start)
    return {name: dict(median=statistics.median(t), quartiles=statistics.quantiles(t, n=4)[::2]) for name, t in times.items()}


def bench_mlp_decoder(repeats, slots=11, dim=128, patches=256, feat_dim=384, hidden=1024, batch=2):
    args = (dim, feat_dim, patches, hidden, .5)
    fast, plain = MLPDecoder(*args), PlainMLPDecoder(*args)
    plain.load_state_dict(fast.state_dict())
    x = torch.randn(batch, slots, dim, requires_grad=True)
    def step(f): f(x).square().mean().backward()
    sides = {'plain': lambda: step(plain), 'slotnb': lambda: step(lambda s: fast(s).recon)}
    difference = (fast(x).recon - plain(x)).abs().max().item()
    assert difference < 1e-4, difference
    return alternate(sides, repeats) | dict(what='MLP broadcast decoder, forward and backward', largest_difference=difference)


def bench_epoch(repeats, scenes=60, dim=384):
    "The default model: an epoch of 60 scenes at batch 2, features in memory."
    config, feats, epoch = TrainConfig(device='cpu'), torch.randn(scenes, 256, dim), iter(range(10**6))
    model = build(config, dim)
    opt = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    return alternate({'slotnb': lambda: train_epoch(model, opt, feats, config, next(epoch))}, repeats) | dict(what=f'epoch of {scenes} scenes at batch {config.batch_size}')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--repeats', type=int, default=15, help='how often each side runs')
    p.add_argument('--out', default='benchmarks/result.json', help='where the numbers go')
    args = p.parse_args()
    results = [bench_mlp_decoder(args.repeats), bench_epoch(max(3, args.repeats//3))]
    machine = dict(processor=platform.processor() or platform.machine(), threads=torch.get_num_threads(), torch=torch.__version__,
                   capability=torch.backends.cpu.get_cpu_capability())
    for r in results:
        ratio = f", {r['plain']['median']/r['slotnb']['median']:.2f}x the plain one" if 'plain' in r else ''
        print(f"{r['what']}: {r['slotnb']['median']:.3f} s{ratio}")
    Path(args.out).write_text(json.dumps(dict(machine=machine, results=results), indent=1) + '\n')


if __name__=='__main__': main()
