"A run in rounds that is killed between and inside rounds ends in the numbers of one that is not."

import os
import signal
import subprocess
import sys
from safetensors import safe_open
from slotnb.runs.config import TrainConfig
from slotnb.runs.folder import epochs_done

SMALL = dict(resolution='112', weights='random', batch_size=4, num_epochs=3, warmup_epochs=1, device='cpu')
# kills itself after the row of an epoch of a round is written and before its state is saved
CODE = """
import os, signal, sys
from slotnb.runs import folder
from slotnb.runs.config import TrainConfig
from slotnb.train import fit

append, (kill_round, kill_epoch) = folder._append, eval(sys.argv[2])


def append_and_die(path, row):
    append(path, row)
    if f'round{kill_round}' in str(path) + 'round3' * ('round' not in str(path)) and row['epoch'] == kill_epoch:
        os.kill(os.getpid(), signal.SIGKILL)


folder._append = append_and_die
fit(TrainConfig(**eval(sys.argv[1])), show_progress=False, save_every=0.0)
"""


def run(settings, kill=(0, 0)):
    command = [sys.executable, '-c', CODE, repr(settings), repr(kill)]
    return subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS='1')).returncode


def states(folder):
    "The best state of every round: tensors and what is written beside them."
    found = {}
    for path in sorted(folder.rglob('best_model.safetensors')):
        with safe_open(path, 'pt') as f:
            found[str(path.relative_to(folder))] = (
                f.metadata(),
                {k: f.get_tensor(k).numpy().tobytes() for k in f.keys()},
            )
    return found


def test_killed_between_and_inside_rounds_equals_uninterrupted(tmp_path, few_scenes):
    settings = SMALL | dict(data_dir=str(few_scenes))
    whole, killed = (settings | dict(save_dir=str(tmp_path / name)) for name in ('whole', 'killed'))
    assert run(whole) == 0
    for kill in ((1, 2), (2, 1), (3, 0)):  # the last epoch of round 1, inside round 2, the first of round 3
        assert run(killed, kill) == -signal.SIGKILL
    assert run(killed) == 0
    want, got = states(tmp_path / 'whole'), states(tmp_path / 'killed')
    assert len(want) == 3 and list(want) == list(got)
    for name in want:
        assert want[name] == got[name], name
    config = TrainConfig(**killed)
    assert epochs_done(config) == 9 and [c.rounds for c in config.round_configs] == [1, 2, 3]
