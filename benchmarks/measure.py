"What every benchmark measures with: sides that take turns, bytes of tensors, floating point operations, the machine."

import gc, os, platform, re, statistics, time

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # torch's profiler is talkative
from importlib.metadata import version
from pathlib import Path
import numpy as np, torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from slotnb.core import has_bf16
from slotnb.panels import in_panels, panel_linear, panels_obstacle
from slotnb.products import linear


def spread(times):
    "Median and quartiles, in seconds."
    return dict(median=statistics.median(times), quartiles=statistics.quantiles(times, n=4)[::2], n=len(times))


def precisions(small=False):
    "What slotnb's side is measured in. Without units for bfloat16 a step in it takes many times as long as in fp32, and nobody would train so; a trial at tiny sizes tries both."
    return ('fp32', 'bf16') if small or has_bf16(torch.device('cpu')) else ('fp32',)


def alternate(sides, repeats, warm=False):
    """Seconds of each side on the clock, its speed-up over the first, and seconds of the processor: they take turns, so that a slow minute hits all; a ratio
    is taken within each turn. What is not warm yet runs once before."""
    for f in () if warm else sides.values():
        f()
    wall, processor = {name: [] for name in sides}, {name: [] for name in sides}
    for _ in range(repeats):
        for name, f in sides.items():
            start = time.perf_counter(), time.process_time()
            f()
            wall[name].append(time.perf_counter() - start[0])
            processor[name].append(time.process_time() - start[1])
    first = next(iter(wall.values()))
    return {
        name: spread(t)
        | dict(ratio=spread([a / b for a, b in zip(first, t)]), processor=statistics.median(processor[name]))
        for name, t in wall.items()
    }


def peak_bytes(f):
    """Bytes of tensors that live at the same time at most while `f` runs, beyond those that lived before: gradients of the last step that are freed first
    make room. Torch's allocator is asked, and what others left to Python's collector is collected before, so it is the same every time. The second of two calls
    counts: the allocator knows the size of what is freed only if it was asked when that was made, as the last step's gradients were in the first call."""
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
                f()
    finally:
        gc.enable()
    events = sorted(
        ((e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]'),
        key=lambda e: e[0],
    )
    return max(0, int(np.cumsum([n for _, n in events]).max()))


def flops(f):
    "Floating point operations of the matrix products in `f`."
    product = lambda a, b, **_: 2 * a[0] * a[1] * b[1]
    more = {torch.ops.aten.addmm_: lambda out, a, b, **_: product(a, b)}
    if torch.backends.mkldnn.is_available():
        more[torch.ops.mkldnn._linear_pointwise] = lambda x, w, *_, **__: 2 * x[0] * x[1] * w[0]
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        f()
    return counter.get_total_flops()


def gemm_peak(names, repeats=7, rows=3584, width=1024):
    "The most FLOP/s that a large matrix product reaches here, by precision."
    peak = {}
    for name in names:
        dtype = dict(fp32=torch.float32, bf16=torch.bfloat16)[name]
        a, b = torch.randn(rows, width).to(dtype), torch.randn(width, width).to(dtype)
        out, best = torch.empty(rows, width, dtype=dtype), float('inf')
        ways = [
            lambda: torch.mm(a, b, out=out),
            lambda: linear(a, b),
        ]  # two libraries in fp32 (`01_products`), and what slotnb compiles (`fast/cpu`)
        if name == 'fp32' and not panels_obstacle(width, width):
            panels, bias = in_panels(a), torch.zeros(width)
            ways.append(lambda: panel_linear(panels, b, bias, skip=False))
        for multiply in ways:
            for _ in range(repeats):
                start = time.perf_counter()
                multiply()
                best = min(best, time.perf_counter() - start)
        peak[name] = 2 * rows * width * width / best
    return peak


ENERGY = (
    sorted(Path('/sys/class/powercap').glob('intel-rapl:?/energy_uj')) if Path('/sys/class/powercap').is_dir() else []
)


def joules():
    "The processor's energy counter, where the system lets us read one; else None."
    try:
        return sum(int(p.read_text()) for p in ENERGY) / 1e6 if ENERGY else None
    except OSError:
        return None


def machine():
    "All that a time depends on."
    info = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    model, flags = re.search(r'model name\s*: (.*)', info), re.search(r'flags\s*: (.*)', info)
    wanted = ('avx2', 'fma', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'amx_tile', 'amx_bf16', 'amx_int8')
    return dict(
        processor=model[1] if model else platform.machine(),
        cores=os.cpu_count(),
        instructions=[f for f in wanted if flags and f in flags[1].split()],
        torch_uses=torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        load_before=os.getloadavg()[0],
        energy='readable' if joules() is not None else 'not readable',
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        platform=platform.platform(),
        versions=dict(
            python=platform.python_version(), **{p: version(p) for p in ('slotnb', 'torch', 'timm', 'numpy')}
        ),
    )
