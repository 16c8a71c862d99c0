"""``nnodes=2``: two launchers on this machine stand in for two machines, over loopback and gloo, alone and by srun."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from process_runs import fingerprint
from ready_process import REPOSITORY
from slurm_cluster import Cluster, cluster_or_skip, free_ports
from test_grid_on_slurm import RUN, in_the_middle, one_run, wait_for

from utils.errors import CONNECTION_LOST
from utils.processes.stopping import EXIT_INTERRUPTED
from utils.run_folder.folder import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

PATIENCE = 300  # seconds
EPOCHS = 12
HERE = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
HERE |= {"OMP_NUM_THREADS": "1", "dataset": "imagefolder", "net1": "resnet8", "net2": "resnet8"}


def keys(data: Path, root: Path) -> list[str]:
    return [word for word in one_run(data, root, EPOCHS) if "." in word.partition("=")[0]] + ["kd.selection=random"]


def launch(data: Path, root: Path, *words: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        ["sh", "train.sh", *keys(data, root), *words],
        cwd=REPOSITORY,
        env=os.environ | HERE | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def launch_two(data: Path, root: Path, *words: str) -> list[subprocess.Popen]:
    """``train.sh`` on two machines of one process each."""
    variables = {"nnodes": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(*free_ports(1))}
    return [launch(data, root, *words, **variables) for _ in range(2)]


def ending(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def worker_of(launcher: subprocess.Popen) -> int:
    (child,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    return int(child)


def assert_lost(process: subprocess.Popen) -> None:
    code, _, errors = ending(process)
    assert (code, errors.count("\n")) == (EXIT_INTERRUPTED, 1), errors
    assert errors.startswith("error: ")
    assert errors.endswith(f"{CONNECTION_LOST}\n")


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> dict[str, str]:
    """Two processes on one machine, which nobody interrupts."""
    root = tmp_path_factory.mktemp("whole")
    code, _, errors = ending(launch(data, root, nproc="2"))
    assert (code, errors) == (0, "")
    return fingerprint(RunDir(root / RUN))


def test_two_machines_of_one_process_are_one_machine_of_two(data, whole, tmp_path):
    ends = [ending(process) for process in launch_two(data, tmp_path)]
    assert [(code, errors) for code, _, errors in ends] == [(0, ""), (0, "")]
    assert sorted(out.count("best val ") for _, out, _ in ends) == [0, 1]  # one process writes
    assert "| 2 processes, each on " in ends[0][1] + ends[1][1]
    assert fingerprint(RunDir(tmp_path / RUN)) == whole


def test_a_machine_that_is_lost_ends_the_other_with_one_line_and_resuming_is_exact(data, whole, tmp_path):
    """The power goes: launcher and worker are gone at once."""
    first, second = launch_two(data, tmp_path, "training.save_every_steps=3")
    in_the_middle(tmp_path / RUN)
    worker = worker_of(second)
    second.kill()
    os.kill(worker, signal.SIGKILL)
    assert_lost(first)
    ending(second)
    assert not RunDir(tmp_path / RUN).result.exists()
    assert [ending(process)[::2] for process in launch_two(data, tmp_path, "--resume")] == [(0, "")] * 2
    assert fingerprint(RunDir(tmp_path / RUN)) == whole


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """Of two nodes, both of which are this machine."""
    with cluster_or_skip(nodes=2) as running:
        yield running


def documented() -> str:
    """The sbatch file that docs/slurm.md shows."""
    text = (REPOSITORY / "docs/slurm.md").read_text(encoding="utf-8")
    return next(block for block in text.split("```bash\n")[1:] if "#SBATCH" in block).split("```")[0]


def test_the_documented_sbatch_file_is_requeued_at_its_limit_and_goes_on_exactly(cluster, data, whole, tmp_path):
    """Two nodes of one process; the variables and keys are those of this test."""
    script = documented()
    for shown, here in (
        ("--gpus-per-node=4 --cpus-per-task=32", "--cpus-per-task=1"),
        ("dataset=cifar-100 net1=vgg13 net2=vgg8 distiller=at", "distiller=at"),
        # The names of the nodes do not resolve here.
        ("nproc=4", f"nproc=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={free_ports(1)[0]}"),
        ("run/cifar-100/1029/adaptive-at/vgg13-vgg8", str(tmp_path / RUN)),
        ("sh train.sh", " ".join(["sh train.sh", *keys(data, tmp_path)])),
    ):
        assert shown in script
        script = script.replace(shown, here)
    (tmp_path / "job.sh").write_text(script)
    job = ["sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={tmp_path}/log.txt", str(tmp_path / "job.sh")]
    cluster.environment |= HERE
    number = cluster(*job).strip()
    in_the_middle(tmp_path / RUN)
    cluster("scancel", "--signal=USR1", number)
    cluster.start_again(PATIENCE)
    wait_for(lambda: cluster.jobs()[0]["JobState"] in ("COMPLETED", "FAILED"))
    log = (tmp_path / "log.txt").read_text()
    assert (cluster.jobs()[0]["JobState"], cluster.jobs()[0]["Restarts"]) == ("COMPLETED", "1"), log + cluster.logs()
    assert "all saved; the same command with --resume goes on" in log
    assert fingerprint(RunDir(tmp_path / RUN)) == whole
