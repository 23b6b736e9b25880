"""How time and memory of a run grow: with the scenes (a real `fit`, in a process of its own for each size), with the tokens and with the slots (a training step).

Features are random and come from a stand-in backbone through the real cache, which is deleted again. Exponents are slopes of log against log: over all
sizes, and over the upper half, where the constant part no longer flatters.

python benchmarks/scale.py [--scenes 60 200 600 6000] [--out benchmarks/scale.json] [--figure benchmarks/scale.png]
"""

import argparse, json, os, platform, re, statistics, subprocess, sys, tempfile, threading, time
from dataclasses import replace
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # torch's profiler is talkative
import numpy as np, torch
from measure import peak_bytes
from slotnb import train
from slotnb.core import write_json
from slotnb.train import TrainStep, make_optimizer
from slotnb.runs.config import TrainConfig
from slotnb.train import build, fit, train_epoch
from slotnb.evaluate import evaluate

MALLOC = dict(
    MALLOC_MMAP_THRESHOLD_='1000000'
)  # tensors above 1 MB go back to the system when they are freed, so that peaks are the run's and not the allocator's
SCENES, TOKENS, SLOTS = (60, 200, 600, 6000), (256, 576, 1024, 2304, 4096), (4, 8, 16, 32, 64)


def exponents(sizes, values, name):
    "Slope of log values against log sizes: of all, and of the upper half."
    slope = lambda k: float(np.polyfit(np.log(sizes[k:]), np.log(values[k:]), 1)[0])
    return {name: slope(0), f'{name}_upper': slope(min(len(sizes) // 2, len(sizes) - 2))}


class OwnMemory:
    "Sampled in a thread: bytes that only this process has (RssAnon), so without the cache's mapped pages, which the system takes back when it needs them."

    def __enter__(self):
        self.base = self.peak = self.now()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()

    def watch(self):
        while not self.over.wait(0.004):
            self.peak = max(self.peak, self.now())

    def now(self):
        return 1024 * int(re.search(r'RssAnon:\s+(\d+)', Path('/proc/self/status').read_text())[1])


def fit_side(scenes, settings, in_memory, evaluated):
    "One size, in a process of its own: the run's seconds an epoch and its memory beyond what the libraries take."
    sys.path.insert(0, str(Path(__file__).parent))
    from scale_cache import DIM, TOKENS as PATCHES, Blank, StandIn

    Blank.has_ground_truth = False
    train.open_split, train.frozen_backbone = (
        (lambda config, split, progress: Blank(scenes)),
        (lambda config: StandIn(0)),
    )
    if in_memory is not None:
        train.IN_MEMORY = in_memory
    with tempfile.TemporaryDirectory(prefix='slotnb_scale_') as d:
        os.environ['SLOTNB_CACHE'] = d
        config = replace(TrainConfig(device='cpu', save_dir=f'{d}/run'), **settings)
        train.prepare(config, False)  # the cache is written before anything is measured
        with OwnMemory() as memory:
            start = time.perf_counter()
            run_dir = fit(config, False)
            whole = time.perf_counter() - start
        result = dict(
            scenes=scenes,
            seconds=statistics.median(float(l.split(',')[1]) for l in (run_dir / 'timing.csv').read_text().split()),
            fit_seconds=whole,
            own_mb=(memory.peak - memory.base) / 1e6,
            base_mb=memory.base / 1e6,
            features_mb=scenes * PATCHES * DIM * 4 / 1e6,
        )
        if evaluated:
            with OwnMemory() as memory:
                start = time.perf_counter()
                evaluate(run_dir, False)
            result |= dict(evaluate_seconds=time.perf_counter() - start, evaluate_mb=(memory.peak - memory.base) / 1e6)
        return result


def scale_scenes(sizes=SCENES, settings={}, in_memory=None, evaluated=False, threads=None):
    "`fit` against the number of scenes, the default model; few scenes are seen for more epochs, of which the median counts."
    rows = []
    for n in sizes:
        side = json.dumps(
            [n, dict(num_epochs=max(1, min(5, 600 // n)), warmup_epochs=0) | settings, in_memory, evaluated]
        )
        done = subprocess.run(
            [sys.executable, __file__, '--side', side, '--threads', str(threads or torch.get_num_threads())],
            env=os.environ | MALLOC,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout.splitlines()[-1]))  # above it a run may have called a collapse
    columns = {k: [r[k] for r in rows] for k in rows[0]}
    return dict(
        what='scenes',
        decoder=TrainConfig(**settings).decoder,
        sizes=list(sizes),
        kept_mb=(train.IN_MEMORY if in_memory is None else in_memory) / 1e6,
        **columns,
        exponents=exponents(sizes, columns['seconds'], 'seconds') | exponents(sizes, columns['own_mb'], 'own_mb'),
    )


def _step(config, tokens, dim):
    "A whole training step, as `fit` does it: the returned function takes the number of the step."
    torch.manual_seed(0)
    model, feats = build(config, dim, tokens), torch.randn(config.batch_size, tokens, dim)
    step = TrainStep(model, make_optimizer(model.parameters(), config.lr), config.diversity_weight, config.clip_norm)
    return lambda i: train_epoch(step, feats, config, i)


def _steps(what, sizes, steps, repeats, **about):
    "Time and memory of the steps; the sizes take turns, so that a slow minute hits all."
    peaks, times = (
        [peak_bytes(lambda f=f: (f(0), f(1))) for f in steps],
        [[] for _ in steps],
    )  # activations, gradients, Adam's moments; not the parameters
    for i in range(repeats):
        for f, t in zip(steps, times):
            start = time.perf_counter()
            f(2 + i)
            t.append(time.perf_counter() - start)
    seconds = [statistics.median(t) for t in times]
    return dict(
        what=what,
        **about,
        sizes=list(sizes),
        seconds=seconds,
        peak_mb=[p / 1e6 for p in peaks],
        exponents=exponents(sizes, seconds, 'seconds') | exponents(sizes, peaks, 'peak_mb'),
    )


def scale_tokens(sizes=TOKENS, decoder='attention', hidden_dim=512, repeats=5, dim=384):
    config = TrainConfig(device='cpu', decoder=decoder, hidden_dim=hidden_dim)
    return _steps(
        'tokens',
        sizes,
        [_step(config, n, dim) for n in sizes],
        repeats,
        decoder=decoder,
        hidden_dim=hidden_dim,
        slots=config.num_slots,
    )


def scale_slots(sizes=SLOTS, decoder='attention', hidden_dim=512, repeats=5, dim=384, tokens=256):
    config = TrainConfig(device='cpu', decoder=decoder, hidden_dim=hidden_dim)
    return _steps(
        'slots',
        sizes,
        [_step(replace(config, num_slots=k), tokens, dim) for k in sizes],
        repeats,
        decoder=decoder,
        hidden_dim=hidden_dim,
        tokens=tokens,
    )


def scale_all(scenes=SCENES, tokens=TOKENS, slots=SLOTS, repeats=5, mlp_width=128):
    "Everything of the figure: scenes with the default model, tokens and slots with the default model and with a narrow MLP decoder."
    sides = (dict(), dict(decoder='mlp', hidden_dim=mlp_width))
    return [
        scale_scenes(scenes),
        *(scale_tokens(tokens, repeats=repeats, **s) for s in sides),
        *(scale_slots(slots, repeats=repeats, **s) for s in sides),
    ]


def figure(results, path):
    "Time above, memory below, against scenes, tokens and slots, log-log; a grey line is exponent 1."
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    colours = dict(attention='#0072B2', mlp='#D55E00')  # Okabe and Ito
    columns = list(dict.fromkeys(r['what'] for r in results))
    fig, axs = plt.subplots(2, len(columns), figsize=(4 * len(columns), 6), squeeze=False)
    for r in results:
        memory = 'own_mb' if r['what'] == 'scenes' else 'peak_mb'
        for ax, key in zip(axs[:, columns.index(r['what'])], ('seconds', memory)):
            e = r['exponents']
            ax.loglog(
                r['sizes'],
                r[key],
                marker='o' if r['decoder'] == 'attention' else 's',
                color=colours[r['decoder']],
                label=f"{r['decoder']}: exponent {e[key]:.2f}, upper half {e[f'{key}_upper']:.2f}",
            )
    for ax, what in zip(axs.T, columns):
        for a, label in zip(
            ax,
            (
                'seconds an epoch' if what == 'scenes' else 'seconds a step',
                'memory of its own, MB' if what == 'scenes' else 'peak of tensors, MB',
            ),
        ):
            x, (low, high) = np.array(a.lines[0].get_xdata(), float), a.get_ylim()
            spare = max(1.3, (30 * low / high) ** 0.5)  # what is flat is to look flat
            line = min(l.get_ydata()[0] for l in a.lines) * 0.7 * x / x[0]
            a.plot(x, line, color='0.6', lw=0.8, ls='--', zorder=0)
            a.set(xlabel=what, ylabel=label, ylim=(low / spare, high * spare))
            a.legend(fontsize=7)
            a.set_xticks(x, [f'{v:g}' for v in x])
            a.minorticks_off()
    fig.tight_layout()
    fig.savefig(path, dpi=150)
    plt.close(fig)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        '--scenes', type=int, nargs='+', default=SCENES, help='training scenes, a tenth of which is held out'
    )
    p.add_argument('--repeats', type=int, default=5, help='timed steps of each size of tokens and slots')
    p.add_argument('--threads', type=int, default=2)
    p.add_argument('--out', default='benchmarks/scale.json', help='where the numbers go')
    p.add_argument('--figure', default='benchmarks/scale.png', help='where the figure goes')
    p.add_argument('--side', help=argparse.SUPPRESS)
    c = p.parse_args()
    torch.set_num_threads(c.threads)
    if c.side:
        return print(json.dumps(fit_side(*json.loads(c.side))))
    results = scale_all(tuple(c.scenes), repeats=c.repeats)
    write_json(
        c.out,
        dict(
            results=results,
            machine=dict(
                cpus=os.cpu_count(),
                load_average=os.getloadavg()[1],
                threads=torch.get_num_threads(),
                platform=platform.platform(),
                torch=torch.__version__,
                capability=torch.backends.cpu.get_cpu_capability(),
            ),
        ),
    )
    figure(results, c.figure)
    for r in results:
        memory = r.get('own_mb') or r['peak_mb']
        print(
            f"{r['what']}, {r['decoder']}: "
            + ', '.join(f'{n}: {s:.3f} s {m:.0f} MB' for n, s, m in zip(r['sizes'], r['seconds'], memory))
        )
        print('   exponents: ' + ', '.join(f'{k} {v:.2f}' for k, v in r['exponents'].items()))


if __name__ == '__main__':
    main()
