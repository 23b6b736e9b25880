"""A SLURM cluster on this machine: munged, one controller and two nodes on the loopback interface, as Debian packages
them (slurm-wlm, munge). Needs root, as slurmd does."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={munge}
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdTimeout=5
JobRequeue=1
ReturnToService=2
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP
"""
PROGRAMS = 'munged slurmctld slurmd sbatch squeue scancel sinfo'.split()


def missing():
    "Programs of a cluster that this machine lacks; root counts as one."
    path = os.environ['PATH'] + ':/usr/sbin'
    return [p for p in PROGRAMS if not shutil.which(p, path=path)] + ([] if os.geteuid() == 0 else ['root'])


def free_ports(n):
    socks = [socket.socket() for _ in range(n)]
    for s in socks:
        s.bind(('127.0.0.1', 0))
    ports = [s.getsockname()[1] for s in socks]
    for s in socks:
        s.close()
    return ports


class Cluster:
    "Starts the cluster in a folder; `kill(node)` ends a node as a power failure would."

    def __init__(self, folder: Path):
        self.folder, self.processes = folder, {}
        for name in ('state', 'spool.n1', 'spool.n2'):
            (folder / name).mkdir(parents=True)
        key, munge = folder / 'munge.key', folder / 'munge'
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        munge.mkdir(mode=0o755)
        self.conf = folder / 'slurm.conf'
        host = socket.gethostname().split('.')[0]
        self.conf.write_text(CONF.format(host=host, ports=free_ports(3), folder=folder, munge=munge / 'socket'))
        self.env = os.environ | dict(SLURM_CONF=str(self.conf), PATH=os.environ['PATH'] + ':/usr/sbin')
        files = [f'--{what}-file={munge}/{what}' for what in ('pid', 'log', 'seed')]
        self.start('munged', '--foreground', '--force', f'--key-file={key}', f'--socket={munge}/socket', *files)
        self.wait(lambda: (munge / 'socket').exists(), 'munged')
        self.start('slurmctld', '-D', '-f', str(self.conf))
        for node in ('n1', 'n2'):
            self.start('slurmd', '-D', '-f', str(self.conf), '-N', node, name=node)
        self.wait(lambda: self.ask('sinfo', '-h', '-o', '%t %D') == 'idle 2', 'the nodes')

    def start(self, *cmd, name=''):
        log = open(self.folder / f'{name or cmd[0]}.out', 'w')
        self.processes[name or cmd[0]] = subprocess.Popen(
            cmd, env=self.env, stdout=log, stderr=log, start_new_session=True
        )

    def ask(self, *cmd):
        return subprocess.run(cmd, env=self.env, capture_output=True, text=True).stdout.strip()

    def wait(self, ready, what):
        for _ in range(600):
            if ready():
                return
            time.sleep(0.1)
        raise TimeoutError(f'waited for {what} in vain; see {self.folder}')

    def pids_of(self, node):
        "The processes of a node and of its jobs."
        found = [self.processes[node].pid]
        for p in Path('/proc').glob('[0-9]*'):
            try:
                env = (p / 'environ').read_bytes().decode(errors='replace').split('\0')
            except OSError:
                continue
            if f'SLURM_CONF={self.conf}' in env and (f'SLURMD_NODENAME={node}' in env):
                found.append(int(p.name))
        return found

    def next_job(self):
        "The number that the next job gets; asking takes one."
        return int(self.ask('sbatch', '--parsable', '-o', '/dev/null', '--wrap', 'true'))

    def kill(self, node):
        for pid in self.pids_of(node):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.processes[node].wait()

    def stop(self):
        self.ask('scancel', '-u', 'root')
        for name in reversed(self.processes):
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
