"""A Slurm cluster of one's own: munged, slurmctld and the slurmd of every node on 127.0.0.1, in a folder.

It is Debian's ``slurm-wlm`` and ``munge`` without accounting; a script stands in for ``sacct``. It shares nothing with
a Slurm that this machine may belong to: ports, keys, sockets and state are its own. Its daemons run as the user who
starts them.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel", "srun")
PATIENCE = 30.0  # seconds for a daemon to come up

_CONF = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0,bf_interval=1
ReturnToService=2
KillWait=20
GresTypes=gpu
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""

# The accounting needs a database. Of the last minutes, squeue knows the same.
_SACCT = """\
#!/bin/sh
echo "JobID|State|NodeList"
exec squeue --noheader --array --states=all --format="%i|%T|%N"
"""


class Cluster:
    """A running cluster; ``with Cluster(folder) as cluster``.

    Args:
        folder: a new one, short enough for the path of a socket (100 characters).
        nodes: how many; all of them are this machine, and each says that it has four CPUs and two GPUs.

    Attributes:
        environment: variables by which Slurm's commands find this cluster.
    """

    def __init__(self, folder: Path, nodes: int = 1):
        self.folder, self.names = folder, [f"node{k + 1}" for k in range(nodes)]
        self._ports = free_ports(nodes + 1)
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self.environment["PATH"] = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        for name in [name for name in self.environment if name.startswith(("SLURM_JOB", "SBATCH_"))]:
            del self.environment[name]
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Cluster:
        try:
            self._prepare()
            self._start_munged()
            self._start("slurmctld", "slurmctld", "-D")
            self._wait(lambda: self("scontrol", "ping").count(" is UP"))
            for name in self.names:
                self._start(f"slurmd-{name}", "slurmd", "-D", "-N", name)
            self._wait(lambda: self("sinfo", "-h", "-o", "%T", "--Node").split() == ["idle"] * len(self.names))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError):
            self("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
        for name in reversed(list(self._daemons)):
            self._end(name)

    def __call__(self, *command: str) -> str:
        """Run one of Slurm's commands and return its output.

        Raises:
            subprocess.CalledProcessError: it failed.
        """
        options = {"env": self.environment, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.run(command, check=True, timeout=PATIENCE, **options).stdout

    def jobs(self) -> list[dict[str, str]]:
        """What ``scontrol`` knows of every job, those that ended included."""
        lines = self("scontrol", "--oneliner", "show", "job").splitlines()
        return [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in lines]

    def start_again(self, patience: float) -> None:
        """Wait for a job that goes back into the queue, and let it start: Slurm lets it wait for two minutes."""
        end = time.monotonic() + patience
        while not (waiting := [job["JobId"] for job in self.jobs() if job["Reason"] == "BeginTime"]):
            if time.monotonic() > end:
                raise TimeoutError(f"no job goes back into the queue\n{self.logs()}")
            time.sleep(0.1)
        time.sleep(2)  # else the end of its first script may count as the end of the second one
        for number in waiting:
            self("scontrol", "update", f"JobId={number}", "StartTime=now")

    def logs(self) -> str:
        """The last lines of every daemon's log, for a test that failed."""
        files = sorted(self.folder.glob("*.log"))
        return "\n".join(f"== {file.name}\n" + "\n".join(file.read_text().splitlines()[-40:]) for file in files)

    def _prepare(self) -> None:
        self.folder.chmod(0o755)  # munge refuses a folder that others may write to
        (self.folder / "state").mkdir()
        (self.folder / "bin").mkdir()
        (self.folder / "bin/sacct").write_text(_SACCT)
        (self.folder / "bin/sacct").chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        node = "NodeName={} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=4 RealMemory=4000 Gres=gpu:2"
        nodes = "\n".join(node.format(*pair) for pair in zip(self.names, self._ports[1:]))
        text = _CONF.format(folder=self.folder, ports=self._ports, user=getpass.getuser(), nodes=nodes)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")

    def _start_munged(self) -> None:
        files = {
            "key-file": "munge.key",
            "socket": "munge.socket",
            "pid-file": "munged.pid",
            "seed-file": "munged.seed",
        }
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        self._start("munged", "munged", "--foreground", "--force", *options)
        self._wait((self.folder / "munge.socket").exists)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name}.out.log").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                [program, *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # a Ctrl-C is for the tests
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def _wait(self, condition) -> None:
        end = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(subprocess.SubprocessError):  # of a command that nobody answers yet
                if condition():
                    return
            dead = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if dead or time.monotonic() > end:
                raise RuntimeError(f"the cluster does not start ({', '.join(dead) or 'too slow'})\n{self.logs()}")
            time.sleep(0.05)


@contextlib.contextmanager
def cluster_or_skip(nodes: int = 1) -> Iterator[Cluster]:
    """A cluster in a folder of its own; the test is skipped where Slurm is missing."""
    if missing := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"no Slurm here: {', '.join(missing)} missing; apt-get install slurm-wlm munge")
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    with Cluster(folder, nodes) as running:
        yield running
    shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]
