"""`slotnb sweep --executor slurm` on a real SLURM of two nodes. A node is killed in the middle; the results are those
of `local`. Skipped where Debian's slurm-wlm and munge, or root, are missing, but never by CI."""

import os
import pytest
from clusters import same_runs, small_sweep, when_training
from conftest import copy_scenes
from slotnb.core import SlotnbError
from slotnb.runs.executors import Execution, make_executor
from slotnb.sweep import sweep
from slurm_cluster import Cluster, missing

if missing() and not os.environ.get('CI'):
    pytest.skip(f'no SLURM here: {", ".join(missing())}', allow_module_level=True)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp('slurm'))
    with pytest.MonkeyPatch.context() as patch:
        for name in ('SLURM_CONF', 'PATH'):
            patch.setenv(name, cluster.env[name])
        yield cluster
    cluster.stop()


def test_what_slurm_refuses(cluster, tmp_path):
    for settings, why in (
        (dict(partition='gpu'), 'SLURM refuses the jobs: .*[Ii]nvalid partition'),
        (dict(gpus=1), 'SLURM refuses the jobs: '),
        (dict(slurm=('account',)), "slurm 'account' must read name=value"),
    ):
        with pytest.raises(SlotnbError, match=why):
            with make_executor(Execution(executor='slurm', **settings), 1, False, tmp_path) as executor:
                executor.call(int, '1')


def test_a_value_and_an_error_of_a_job(cluster, tmp_path):
    with make_executor(Execution(executor='slurm'), 1, False, tmp_path) as executor:
        assert executor.call(int, '12') == 12


def test_a_node_is_killed(cluster, tmp_path):
    data = copy_scenes(tmp_path / 'data', train=8, test=2)
    local = small_sweep(tmp_path / 'local', data, workers=2, cpus=1)
    assert sweep(local, False) == {}
    killed = when_training(tmp_path / 'slurm', lambda: cluster.kill('n1'))
    assert sweep(small_sweep(tmp_path / 'slurm', data, executor='slurm'), False) == {}
    assert killed, 'all runs had finished before the node was killed'
    same_runs(tmp_path / 'local', tmp_path / 'slurm')
    cluster.wait(lambda: not cluster.ask('squeue', '--me', '-h'), 'the end of the jobs')  # no job is left
    jobs = cluster.next_job()
    assert sweep(small_sweep(tmp_path / 'slurm', data, executor='slurm'), False) == {}
    assert cluster.next_job() == jobs + 2  # one that prepares the data; no finished run is submitted
