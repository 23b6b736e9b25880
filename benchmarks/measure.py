"What every benchmark measures with: sides that take turns, peak memory of tensors, the machine."

import gc
import os
import platform
import re
import statistics
import time
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # torch's profiler logs a lot
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile


def spread(values):
    "Median and quartiles."
    quartiles = statistics.quantiles(values, n=4)[::2] if len(values) > 1 else [values[0]] * 2
    return dict(median=statistics.median(values), quartiles=quartiles, n=len(values))


def wait(device):
    "Wait for a GPU, so that the clock sees its work."
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def alternate(sides, repeats, device=torch.device('cpu')):
    """Seconds of each side and its speed-up over the first side. The sides take turns, so that a slow minute of the
    machine hits all of them, and a ratio is formed within each turn. Each side runs before: on a GPU five times, as a
    CUDA graph is recorded in its fourth call."""
    for f in sides.values():
        for _ in range(5 if device.type == 'cuda' else 1):
            f()
    wait(device)
    seconds = {name: [] for name in sides}
    for _ in range(repeats):
        for name, f in sides.items():
            start = time.perf_counter()
            f()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    first = next(iter(seconds.values()))
    return {name: spread(s) | dict(ratio=spread([a / b for a, b in zip(first, s)])) for name, s in seconds.items()}


def peak_bytes(f, device=torch.device('cpu')):
    """Largest number of bytes of tensors that exist at the same time while `f` runs, beyond those that existed before
    it. The allocator is asked, so the answer is the same every time. `f` runs twice, and the second call counts."""
    if device.type == 'cuda':
        f()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
                f()
    finally:
        gc.enable()
    events = [(e.start_ns(), e.nbytes()) for e in p.profiler.kineto_results.events() if e.name() == '[memory]']
    return max(0, int(np.cumsum([n for _, n in sorted(events, key=lambda e: e[0])]).max()))


def machine():
    "All that a time depends on."
    info = Path('/proc/cpuinfo').read_text() if Path('/proc/cpuinfo').exists() else ''
    model, family, flags = (re.search(rf'{key}\s*: (.*)', info) for key in ('model name', 'cpu family', 'flags'))
    wanted = ('avx2', 'fma', 'avx512f', 'avx512_bf16', 'amx_bf16')
    return dict(
        processor=f'{model[1]} family {family[1]}' if model and family else platform.machine(),
        cores=os.cpu_count(),
        instructions=[f for f in wanted if flags and f in flags[1].split()],
        torch_uses=torch.backends.cpu.get_cpu_capability(),
        load_before=os.getloadavg()[0],
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        versions=dict(python=platform.python_version()) | {p: version(p) for p in ('slotnb', 'torch', 'timm')},
        date=time.strftime('%Y-%m-%d'),
    )


def machine_name(about):
    "File name for the results of a machine: the processor and what torch uses of it, or the GPU."
    return re.sub(r'[^a-z0-9]+', '-', (about['gpu'] or f"{about['processor']} {about['torch_uses']}").lower()).strip(
        '-'
    )
