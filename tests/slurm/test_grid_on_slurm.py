"""``python -m utils.grid --slurm`` on a real Slurm: stopped runs go on exactly, and none is trained twice.

Needs Debian's ``slurm-wlm`` and ``munge`` and submitit; run with ``sh test.sh -m slurm``. Takes about five minutes.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import ready_process
from process_runs import fingerprint
from ready_process import REPOSITORY
from slurm_cluster import Cluster, cluster_or_skip

from utils.processes.stopping import EXIT_INTERRUPTED
from utils.run_folder.folder import RunDir

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

PATIENCE = 600  # seconds
PACE = ("training.batch_size=8", "training.num_workers=0", "validation.num_workers=0")
SHORT, LONG = 30, 220  # epochs; the long one is hit by a limit of a minute twice
RUN = "imagefolder/1029/random-at/resnet8-resnet8"
wait_for = functools.partial(ready_process.wait_for, patience=PATIENCE)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("submitit")
    with cluster_or_skip() as running:
        yield running


def words_for(data: Path, root: Path) -> list[str]:
    keys = [*PACE, f"dataset.root={data}/images", "dataset.img_h=16", "training.device=cpu", f"run.root={root}"]
    return ["--dataset", "imagefolder", "--pairs", "resnet8-resnet8", *keys]


def one_run(data: Path, root: Path, epochs: int = SHORT) -> list[str]:
    """A student of a teacher that is there, whose gates are drawn at random."""
    keys = [f"training.epochs={epochs}", f"kd.teacher.checkpoint={data}/teacher.pth"]
    return [*words_for(data, root), "--distillers", "at", "--selections", "random", *keys]


def teacher_and_four(data: Path, root: Path) -> list[str]:
    of_teacher = [word for key in ("training.epochs=2", *PACE[:2]) for word in ("--teacher-arg", key)]
    choice = ["--distillers", "at", "sp", "--selections", "adaptive", "random"]
    return [*words_for(data, root), *choice, *of_teacher, "training.epochs=2"]


class Grid:
    """``python -m utils.grid`` in a process of its own."""

    def __init__(self, words: list[str], environment: dict[str, str], log: Path):
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "utils.grid", *words],
                cwd=REPOSITORY,
                env=environment,
                stdout=output,
                stderr=output,
            )

    @property
    def text(self) -> str:
        return self.log.read_text()

    def end(self, code: int = 0) -> str:
        assert self.process.wait(PATIENCE) == code, self.text
        return self.text


@pytest.fixture
def grid(cluster, tmp_path) -> Iterator[Callable[..., Grid]]:
    """Start a grid on the cluster: ``grid(words, *words for Slurm)``; its jobs are cancelled at the end."""
    started: list[Grid] = []

    def start(words: list[str], *request: str, more: tuple[str, ...] = ()) -> Grid:
        log = tmp_path / f"grid-{len(started)}.txt"
        environment = cluster.environment | {"CUDA_VISIBLE_DEVICES": ""}
        started.append(Grid([*words, *more, "--slurm", *(request or ("time=20",))], environment, log))
        return started[-1]

    yield start
    for item in started:
        item.process.kill()
        item.process.wait()
    cluster("scancel", "--user", "root")
    wait_for(lambda: not cluster("squeue", "--noheader"))


def epochs_done(run: Path) -> int:
    file = RunDir(run).metrics
    return len(file.read_text().splitlines()) if file.exists() else 0


def in_the_middle(run: Path) -> None:
    wait_for(lambda: epochs_done(run) >= 3)
    assert not RunDir(run).result.exists()


def last_job(cluster: Cluster) -> dict[str, str]:
    return max(cluster.jobs(), key=lambda job: int(job["JobId"]))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Callable[[int], dict[str, str]]:
    """The fingerprint of a run that nobody interrupts, on this machine without Slurm."""

    @functools.cache
    def of(epochs: int) -> dict[str, str]:
        root = tmp_path_factory.mktemp("whole")
        Grid(one_run(data, root, epochs), os.environ | {"CUDA_VISIBLE_DEVICES": ""}, root / "log.txt").end()
        return fingerprint(RunDir(root / RUN))

    return of


def test_a_teacher_and_its_four_students_end_as_on_one_machine(cluster, grid, data, tmp_path):
    here = tmp_path / "here"
    pool = Grid(teacher_and_four(data, here), os.environ | {"CUDA_VISIBLE_DEVICES": ""}, tmp_path / "pool.txt")
    there = tmp_path / "there"
    words = teacher_and_four(data, there)
    text = grid(words, "time=20", "gpus=1", "array=1", "comment=passed through").end()
    assert "5 finished" in text
    assert (there / "report/report.html").exists()
    pool.end()
    folders = [path.parent.relative_to(here) for path in here.rglob("result.json")]
    assert len(folders) == 5
    for folder in folders:
        assert fingerprint(RunDir(there / folder)) == fingerprint(RunDir(here / folder)), folder
        assert "checkpoint: " in (there / folder / "slurm.txt").read_text()
    numbers = {json.loads(file.read_text())["job"].partition("_")[0] for file in there.rglob("slurm.json")}
    jobs = [job for job in cluster.jobs() if job.get("ArrayJobId", job["JobId"]) in numbers]
    students = [job for job in jobs if "ArrayJobId" in job]
    (teacher,) = (job for job in jobs if "ArrayJobId" not in job)
    spans = sorted((job["StartTime"], job["EndTime"]) for job in students)
    assert len(spans) == 4
    assert spans[0][0] >= teacher["EndTime"]  # afterok
    assert all(first[1] <= second[0] for first, second in pairwise(spans)), "array=1: one at a time"
    assert {(job["TresPerJob"], job["TimeLimit"]) for job in jobs} == {("gres:gpu:1", "00:20:00")}
    dry = grid(words, more=("--dry-run",)).end()
    assert dry.count("finished") == 5


def test_a_run_that_is_put_back_into_the_queue_goes_on_exactly(cluster, grid, data, whole, tmp_path):
    watching = grid(one_run(data, tmp_path))
    in_the_middle(tmp_path / RUN)
    number = last_job(cluster)["JobId"]
    cluster("scontrol", "requeue", number)
    cluster.start_again(PATIENCE)
    assert "1 finished" in watching.end()
    log = (tmp_path / RUN / "slurm.txt").read_text()
    assert log.count("all saved; the same command with --resume goes on") == 1
    assert last_job(cluster)["Restarts"] == "1"
    assert fingerprint(RunDir(tmp_path / RUN)) == whole(SHORT)


def test_a_time_limit_of_a_minute_that_is_hit_twice_changes_nothing(cluster, grid, data, whole, tmp_path):
    watching = grid(one_run(data, tmp_path, LONG), "time=1", "signal=USR1@10")
    for hit in (1, 2):
        cluster.start_again(PATIENCE)
        wait_for(lambda hit=hit: last_job(cluster)["Restarts"] == str(hit))
        wait_for(lambda: last_job(cluster)["JobState"] == "RUNNING")
    cluster("scontrol", "update", f"JobId={last_job(cluster)['JobId']}", "TimeLimit=20")  # twice is enough
    text = watching.end()
    assert "1 finished" in text
    assert last_job(cluster)["Restarts"] == "2"
    assert (tmp_path / RUN / "slurm.txt").read_text().count("all saved; the same command with --resume") == 2
    assert fingerprint(RunDir(tmp_path / RUN)) == whole(LONG)


def test_a_grid_that_is_left_and_started_again_submits_nothing_twice(cluster, grid, data, whole, tmp_path):
    words = one_run(data, tmp_path, LONG)
    assert "submitted: at random" in grid(words, more=("--detach",)).end()
    watching = grid(words)
    in_the_middle(tmp_path / RUN)
    wait_for(lambda: "running: at random" in watching.text)
    watching.process.send_signal(signal.SIGINT)
    text = watching.end(EXIT_INTERRUPTED)
    assert "in Slurm's queue: at random, resnet8-resnet8, seed 1029: job" in text
    number = last_job(cluster)["JobId"]
    *_, line = grid(words, more=("--dry-run",)).end().splitlines()
    assert line.startswith("running ")
    assert line.endswith(f"(job {number})")
    assert "submitted: " not in grid(words).end()
    assert last_job(cluster)["JobId"] == number
    assert fingerprint(RunDir(tmp_path / RUN)) == whole(LONG)


def test_a_refusal_by_slurm_is_one_line_and_leaves_nothing(grid, data, tmp_path):
    *_, line = grid(one_run(data, tmp_path / "run"), "partition=nowhere").end(2).splitlines()
    assert line.startswith("error: --slurm: sbatch: error: invalid partition specified: nowhere")
    assert not (tmp_path / "run/imagefolder").exists()
