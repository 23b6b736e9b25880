"A run on clips that is killed resumes to the last digit, and memory does not grow with the number of clips."

import os
import signal
import subprocess
import sys
from test_train import CODE
from test_video_training import TINY, make_clips

PEAK = """
import resource, sys, torch
from slotnb.features import LazyFeatures
from slotnb.runs.config import TrainConfig
from slotnb.train import make_loss, make_optimizer, train_epoch, train_step
from slotnb.video.batches import training_chunks
from slotnb.video.clips import Clip
from slotnb.video.model import build_model

n, frames = int(sys.argv[1]), 24
config = TrainConfig(mode='video', max_frames=0, loss='contrast', num_slots=5, slot_dim=16)


class Made:  # features that are made when they are read
    shape, device = torch.Size((n * frames, 64, 16)), torch.device('cpu')

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, i):
        return torch.randn(len(i), 64, 16)


feats = LazyFeatures(Made())
clips = [Clip(str(i), torch.arange(frames) + i * frames, torch.arange(frames), 1.0) for i in range(n)]
model = build_model(config, 16, (8, 8))
opt, loss = make_optimizer(config, model.parameters()), make_loss(config)
chunks = training_chunks(feats, clips, config, 0)
chunks.rows = chunks.rows[:48]  # as many steps for any number of clips, from all over the clips
train_epoch(lambda x, noise: train_step(model, loss, opt, x, noise), model, opt, chunks, config, 0)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


def test_sigkill_and_resume_equals_uninterrupted(tmp_path):
    clips = make_clips(tmp_path / 'clips')
    for name, kills in (('whole', ()), ('killed', (0, 1))):
        settings = repr(TINY | dict(data_dir=str(clips), save_dir=str(tmp_path / name), loss='contrast', rounds=1))
        for kill_at in (*kills, -1):
            command = [sys.executable, '-c', CODE, settings, str(kill_at), '0.0']
            code = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1')).returncode
            assert code == (0 if kill_at < 0 else -signal.SIGKILL)
    for file in ('metrics.csv', 'epochs.safetensors', 'best_model.safetensors', 'last_state.safetensors'):
        a, b = ((tmp_path / name / 'dinov2_vits14' / file).read_bytes() for name in ('whole', 'killed'))
        assert a == b, file


def test_memory_is_flat_in_the_number_of_clips():
    peaks = [int(subprocess.run([sys.executable, '-c', PEAK, str(n)], capture_output=True).stdout) for n in (12, 2000)]
    assert peaks[1] < peaks[0] + 50, peaks  # megabytes; the features of 2000 clips would be 200 MB
