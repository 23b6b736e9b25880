"""Images per second of a backbone in fp32 and bf16, in turns in one process, and the error of the faster one on real
images."""

from pathlib import Path
import torch
from measure import alternate
from slotnb.backbones import ViTBackbone
from slotnb.core import SlotnbError, default_device, has_bf16
from slotnb.data import KubricFolders

DATA = Path(__file__).parent.parent / 'data/movi_a_subset'


def bench_extraction(small=False, device='cpu', batch=8, repeats=9, progress=lambda text: None):
    "DINOv2 ViT-S/14 at its own size; bf16 where the device has units for it."
    try:
        exact = ViTBackbone('dinov2_vits14', device=device)
        weights = 'auto'
    except SlotnbError:
        weights = 'random'
        exact = ViTBackbone('dinov2_vits14', weights, device=device)
    scenes = KubricFolders(DATA, 'test')
    images = torch.stack([torch.tensor(scenes[i].image).permute(2, 0, 1) for i in range(2 if small else batch)])
    sides = {'fp32': lambda: exact(images)}
    low = small or has_bf16(default_device(device))
    if low:
        fast = ViTBackbone('dinov2_vits14', weights, device=device, precision='bf16')
        sides['bf16'] = lambda: fast(images)
    progress(', '.join(sides))
    times = alternate(sides, 1 if small else repeats, exact.device)
    want = sides['fp32']()
    for name, t in times.items():
        t['images_per_second'] = len(images) / t['median']
        t['relative_error'] = ((sides[name]() - want).norm() / want.norm()).item()
    return dict(backbone=exact.record, batch=len(images), threads=torch.get_num_threads(), sides=times)
