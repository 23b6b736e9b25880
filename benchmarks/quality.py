"""Does it still learn the same? 2,000 steps from the same weights, data order and noise, written plainly and by slotnb, paired by seed, scored once on the test scenes.

Real DINOv2 features of the committed scenes. Nothing is timed here, so two processes of one thread each train at the same time. One thread does the same
every time, so `run.py` does not train the plain models again whose code, features, libraries and kind of processor are what they were (`plain_key`).

python benchmarks/quality.py [--steps 2000] [--seeds 5] [--first_seed 0] [--only default-plain default-fp32] [--out benchmarks/quality.json]

With intervals of 95 %, one score in forty comes out worse by chance. A side that does is trained again with seeds that nobody has seen:
what `--first_seed 5` makes is shown beside the first five, and with them.
"""

import argparse, inspect, json, os, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
import numpy as np, torch
import slotnb
from measure import machine, precisions
from plain import Plain, PlainStep
from slotnb.core import digest, generator, write_json
from slotnb.losses import fvu
from slotnb.metrics import evaluate_masks
from slotnb.normalizer import Normalizer
from slotnb.fast.many_models import Stack
from slotnb.train import TrainStep, make_optimizer
from slotnb.study import estimate
from slotnb.runs.config import TrainConfig
from slotnb.train import build, lr_at
from slotnb.evaluate import predict
from slotnb.runs.inputs import prepare
from slotnb.fast.many_models import KEEP_MEMORY

DATA = str(Path(__file__).parent.parent / 'data/movi_a_subset')
MODELS = dict(
    default={}, mlp=dict(decoder='mlp', num_slots=7, slot_dim=64, hidden_dim=64)
)  # the papers' decoder at a width that two cores train in minutes
SIDES = [
    ('default', 'plain', 2, 1),
    ('default', 'fp32', 2, 1),
    ('default', 'bf16', 2, 1),
    ('default', 'stack', 2, 1),
    ('default', 'fp32', 16, 1),
    ('default', 'fp32', 16, 8),
    ('mlp', 'plain', 2, 1),
    ('mlp', 'fp32', 2, 1),
    ('mlp', 'bf16', 2, 1),
]  # model, side, batch size, what the rate is multiplied with
STACK = 5  # models of a stack at most
WINDOW = 100  # steps that make a point of a loss curve


def stepper(configs, models, side):
    "A function of features, noise and rate of each model; it returns the MSE of each."

    def own(c, m):
        if side == 'plain':
            plain = Plain(384, m.num_patches, c.slot_dim, c.decoder, c.hidden_dim, c.mask_temperature)
            plain.load_state_dict(m.state_dict())
            plain.to(m.init.mean.device)
            for (name, p), q in zip(plain.named_parameters(), plain.parameters()):
                m.get_parameter(name).data = q.data  # trained plainly, scored as a model of slotnb
            return PlainStep(plain, c.diversity_weight, c.clip_norm)
        return TrainStep(m, make_optimizer(m.parameters(), c.lr), c.diversity_weight, c.clip_norm, side)

    if side != 'stack':
        (step,) = [own(c, m) for c, m in zip(configs, models)]
        return lambda xs, noises, lrs: [step(xs[0], noises[0], lrs[0])[1].item()]
    stack = Stack(
        models,
        [make_optimizer(m.parameters(), c.lr) for c, m in zip(configs, models)],
        [c.diversity_weight for c in configs],
        [c.clip_norm for c in configs],
    )
    return lambda xs, noises, lrs: stack.step(
        torch.stack(xs), torch.stack(noises), torch.tensor(lrs, dtype=torch.float64)
    )[1].tolist()


def train(configs, feats, side, steps):
    "The trained models and their loss curves (MSE, means over windows of steps)."
    models = [build(c, feats.shape[-1], feats.shape[1]).to(feats.device) for c in configs]
    step, mse, i, epoch, per_epoch = stepper(configs, models, side), [], 0, 0, -(-len(feats) // configs[0].batch_size)
    total = max(1, round(steps / per_epoch))
    schedules = [replace(c, num_epochs=total, warmup_epochs=min(c.warmup_epochs, total - 1)) for c in configs]
    while i < steps:
        noises = [generator(c.seed, 'slots', epoch) for c in configs]
        for batches in zip(
            *(
                torch.randperm(len(feats), generator=generator(c.seed, 'order', epoch)).split(c.batch_size)
                for c in configs
            )
        ):
            if i == steps:
                break
            lrs = [lr_at(min(i, total * per_epoch - 1), per_epoch, c) for c in schedules]
            mse.append(
                step(
                    [feats[b] for b in batches],
                    [m.init.draw(len(b), g).to(feats.device) for m, b, g in zip(models, batches, noises)],
                    lrs,
                )
            )
            i += 1
        epoch += 1
    window = max(1, min(WINDOW, steps))
    return models, np.array(mse[: len(mse) // window * window]).T.reshape(len(configs), -1, window).mean(2).tolist()


def score(model_name, side, batch_size, rate, seeds, steps, device='cpu'):
    "Train and score one side, one row a seed. Steps count batches of two, so that all sides see as many images."
    torch.set_num_threads(1)
    config = replace(TrainConfig(device=device, data_dir=DATA), **MODELS[model_name])
    configs = [replace(config, batch_size=batch_size, lr=config.lr * rate, seed=seed) for seed in seeds]
    data, norm = prepare(config, False), Normalizer(config.normalizer)
    models, curves = train(configs, norm(data.train[:]).to(device), side, max(1, steps * 2 // batch_size))
    scenes, test, rows = list(data.scenes['test']), norm(data.test[:]), []
    for model, curve, seed in zip(models, curves, seeds):
        out = predict(model.cpu(), test, seed)
        scores = evaluate_masks(scenes, out.attn, 'attn')[
            ['fg_ari_attn', 'ari_attn', 'mbo_attn']
        ].mean()  # the masks that the project reports
        rows.append(
            dict(
                model=model_name,
                side=side,
                batch_size=batch_size,
                rate=rate,
                seed=seed,
                curve=curve,
                test_fvu=fvu(out.recon, test).item(),
                **{k.removesuffix('_attn'): float(v) for k, v in scores.items()},
            )
        )
    return rows


def paired(rows, model, side, base='plain'):
    "Side minus base at batch 2, mean over seeds: of the loss curves in each window, as multiples of the base's spread over seeds, and of the scores with a 95 % interval."
    of = lambda s: [
        r for r in sorted(rows, key=lambda r: r['seed']) if (r['model'], r['side'], r['batch_size']) == (model, s, 2)
    ]
    a, b = of(side), of(base)
    curves = np.array([r['curve'] for r in a]) - np.array([r['curve'] for r in b])
    off = np.abs(curves.mean(0)) / np.array([r['curve'] for r in b]).std(0, ddof=1)
    result = dict(
        model=model,
        side=side,
        seeds=len(a),
        curve=dict(median=float(np.median(off)), last=float(off[-1]), worst=float(off.max())),
    )
    for k in ('fg_ari', 'ari', 'mbo', 'test_fvu'):
        d = estimate(x[k] - y[k] for x, y in zip(a, b))
        result[k] = dict(difference=d.mean, interval=d.half, spread_of_plain=float(np.std([y[k] for y in b], ddof=1)))
    return result


def plain_key(steps, device):
    "Of all that a plain model's scores depend on, its seed left out."
    sources = [
        *(inspect.getsource(f).encode() for f in (stepper, train, score)),
        Path(__file__).with_name('plain.py'),
        *(
            Path(slotnb.__file__).with_name(f'{m}.py')
            for m in ('core', 'data', 'decoder', 'losses', 'metrics', 'model', 'normalizer', 'slot_attention', 'train')
        ),
    ]
    data, about = prepare(TrainConfig(device=device, data_dir=DATA), False), machine()
    return digest(
        *sources,
        *(split[:].numpy().tobytes() for split in (data.train, data.test)),
        [
            MODELS,
            WINDOW,
            steps,
            device,
            *(about[k] for k in ('processor', 'instructions', 'torch_uses', 'gpu')),
            about['versions']['torch'],
            about['versions']['numpy'],
        ],
    )


def bench_quality(
    steps=2000, seeds=5, small=False, progress=lambda text: None, first_seed=0, only=None, device='cpu', before=None
):
    """Every side and seed, two processes at a time, eight on a GPU; bf16 where it is fast, or in a trial. `only` names sides at batch 2, as 'default-plain'.
    `before` is what this gave another time, whose plain models count if all that they depend on is the same."""
    workers = 2 if device == 'cpu' else 8
    torch.set_num_threads(1)
    sides = [
        s
        for s in SIDES
        if (s[1] != 'bf16' or device != 'cpu' or 'bf16' in precisions(small))
        and (not only or (f'{s[0]}-{s[1]}' in only and s[2] == 2))
    ]
    numbers = list(range(first_seed, first_seed + seeds))
    prepare(TrainConfig(device=device, data_dir=DATA))  # the features are there before the processes ask
    plain = dict(key=plain_key(steps, device), date=time.strftime('%Y-%m-%d'))
    kept = (
        [r for r in before['rows'] if r['side'] == 'plain']
        if before and before.get('plain', {}).get('key') == plain['key']
        else []
    )
    if kept:
        plain = before['plain']
    groups = lambda size: [numbers[i : i + size] for i in range(0, seeds, size)]
    jobs = [
        (*side, group)
        for side in sides
        for group in groups(STACK if side[1] == 'stack' else 1)
        if not any((r['model'], r['side'], r['seed']) == (*side[:2], *group) for r in kept)
    ]
    jobs.sort(key=lambda job: (-len(job[-1]), job[1] != 'plain'))  # long ones first, so that nobody waits at the end
    queue = iter(jobs)

    def run(_):
        "A process of its own, which is given a job as soon as it is done with the last: a line of JSON each."
        process = subprocess.Popen(
            [sys.executable, __file__, '--worker', json.dumps([steps, device])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=KEEP_MEMORY | os.environ | dict(OMP_NUM_THREADS='1'),
        )
        lines = []
        with process.stdin:
            for job in queue:
                print(json.dumps(job), file=process.stdin, flush=True)
                if not (line := process.stdout.readline()):
                    break  # it ended
                lines += json.loads(line)
                progress(
                    f"{lines[-1]['model']} {lines[-1]['side']}, batch {lines[-1]['batch_size']}, seed {lines[-1]['seed']}"
                )
        if process.wait():
            raise SystemExit(f'a training process ended with exit code {process.returncode}')
        return lines

    with ThreadPoolExecutor(workers) as pool:
        rows = [r for lines in pool.map(run, range(workers)) for r in lines] + [
            r for r in kept if r['seed'] in numbers and (r['model'], 'plain', 2, 1) in sides
        ]
    rows.sort(key=lambda r: (SIDES.index((r['model'], r['side'], r['batch_size'], r['rate'])), r['seed']))
    others = dict.fromkeys(
        (m, s) for m, s, b, r in sides if s != 'plain' and (b, r) == (2, 1) and (m, 'plain', 2, 1) in sides
    )
    return dict(
        steps=steps,
        seeds=seeds,
        window=min(WINDOW, steps),
        test_scenes=24,
        plain=plain,
        rows=rows,
        paired=[paired(rows, *o) for o in others] if seeds > 1 else [],
    )


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--steps', type=int, default=2000, help='of batches of two images')
    p.add_argument('--seeds', type=int, default=5, help='each side is trained with so many')
    p.add_argument('--first_seed', type=int, default=0, help='the seeds are this one and those that follow')
    p.add_argument(
        '--only',
        nargs='+',
        choices=dict.fromkeys(f'{m}-{s}' for m, s, _, _ in SIDES),
        metavar='SIDE',
        help='some of '
        + ', '.join(dict.fromkeys(f'{m}-{s}' for m, s, _, _ in SIDES))
        + ', at batch 2; default: all, also at batch 16',
    )
    p.add_argument('--out', default='benchmarks/quality.json', help='where the numbers go')
    p.add_argument('--device', default='cpu', help='where they are trained')
    p.add_argument('--worker', help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.worker:
        for job in sys.stdin:
            print(json.dumps(score(*json.loads(job), *json.loads(args.worker))), flush=True)
        return
    result = bench_quality(
        args.steps,
        args.seeds,
        progress=lambda text: print(text, flush=True),
        first_seed=args.first_seed,
        only=args.only,
        device=args.device,
    )
    write_json(args.out, result)
    for r in result['paired']:
        print(json.dumps(r, indent=1))


if __name__ == '__main__':
    main()
