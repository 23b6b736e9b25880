"""Where the time of an epoch goes when features are cached, and what the backbones would cost in every epoch."""

import time
from dataclasses import replace
import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from slotnb.backbones import ViTBackbone
from slotnb.core import default_device
from slotnb.model import build
from slotnb.runs.config import TrainConfig
from slotnb.runs.inputs import fit_normalizer, prepare
from slotnb.train import make_optimizer, make_step, train_epoch, validate


def _seconds(f, times=3):
    "Median of a few calls, after one call that is not counted."
    f()
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def gflop_per_image(
    net: ViTBackbone,
    images: torch.Tensor,  # (b 3 h w) uint8
) -> float:  # a multiplication and an addition count as two
    "Operations of the matrix products of a forward pass."
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the fused attention of open_clip
    try:
        with FlopCounterMode(display=False) as count:
            net(images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return count.get_total_flops() / len(images) / 1e9


def _decoded(samples):
    return torch.stack([torch.tensor(s.image) for s in samples])  # (b h w 3)


def _read(scenes, workers, pin_memory):
    "Decode all images once."
    for _ in DataLoader(scenes, 2, num_workers=workers, collate_fn=_decoded, pin_memory=pin_memory):
        pass


def time_rows(
    config: TrainConfig,
    workers: tuple[int, ...] = (0, 2, 8),  # of the loader
) -> dict:  # seconds
    "Time of the parts of an epoch, of the backbones, and of reading the images."
    data, device = prepare(config, show_progress=False), default_device(config.device)
    norm = fit_normalizer(config, data, device)
    train, val = norm(data.train[:].to(device)), norm(data.val[:].to(device))
    model = build(config, *train.shape[:0:-1]).to(device)
    opt = make_optimizer(config, model.parameters())
    step, _ = make_step(config, model, opt)

    def epoch_seconds(c):
        return _seconds(lambda: train_epoch(step, model, opt, train, c, 0))

    scenes = len(data.train_and_val)
    out = dict(
        device=str(device),
        scenes=scenes,
        steps=-(-len(train) // config.batch_size),
        steps_seconds=epoch_seconds(config),
        held_out_seconds=_seconds(lambda: validate(model, val, 0)),
        read_and_normalize_seconds=_seconds(lambda: norm(data.train[:].to(device))),
    )
    out['epoch_seconds'] = out['steps_seconds'] + out['held_out_seconds']
    out['train_images'] = len(train)
    sizes = [b for b in (2, 12, 16) if b <= len(train)]
    out['batch_seconds'] = {str(b): epoch_seconds(replace(config, batch_size=b)) for b in sizes}
    images = _decoded([data.scenes['train'][i] for i in range(2)]).permute(0, 3, 1, 2)
    for name in ('dinov2_vits14', 'dino_vits16', 'clip_vitb16'):  # speed and FLOPs do not depend on the weights
        net = ViTBackbone(name, 'random', device=config.device)
        forward = _seconds(lambda: net(images)) / 2
        out[name] = dict(gflop_per_image=gflop_per_image(net, images), forward_seconds_per_image=forward)
    out['read_images_per_second'] = {
        str(w): scenes / _seconds(lambda: _read(data.scenes['train'], w, device.type == 'cuda'), 1) for w in workers
    }
    return out
