"""The grid on Slurm, without one: its requests, and the answers. tests/slurm has a real Slurm."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from launchers import handed_over
from made_up_runs import write_run

from utils.errors import UserError
from utils.grid import slurm
from utils.grid.__main__ import main
from utils.grid.plan import plan
from utils.grid.pool import last_line
from utils.grid.progress import Progress
from utils.grid.slurm import SlurmQueue, describe, import_submitit, read_request
from utils.grid.slurm_task import NOT_ENOUGH_TIME, SlurmTask
from utils.launch import main as launch
from utils.processes.rendezvous import first_host, rendezvous_of
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest
from utils.run_folder.layout import Layout


def test_any_option_of_sbatch_passes_through():
    request = read_request(["gpus=a100:2", "cpus_per_task=4", "exclusive=true", "array=3", "signal=USR1@60", "time=9"])
    assert request.at_a_time == 3
    assert request.processes == 2
    assert request.keys == {
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "gpus": "a100:2",
        "cpus-per-task": "4",
        "exclusive": True,
        "time": "9",
        "signal": "B:USR2@60",  # the signal that submitit handles
    }
    assert [read_request([], jobs).at_a_time for jobs in (2, None)] == [2, None]
    assert read_request([]).keys["signal"] == "B:USR2@120"
    assert read_request([]).keys["time"] == "4:00:00"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("p=all", "found 'p=all', must be a long option of sbatch and its value"),
        ("time=1\n#SBATCH", "must be a long option"),
        ("dependency=afterok:3", "the grid sets dependency itself"),
        ("array=0-3", "found array=0-3, must be the number of jobs that may run at a time"),
    ],
)
def test_a_wrong_word_for_slurm_is_one_line(word, line):
    with pytest.raises(UserError, match="--slurm: ") as error:
        read_request([word])
    assert line in str(error.value)


def test_only_slurm_goes_on_with_the_runs_alone():
    with pytest.raises(UserError, match="--detach: only with --slurm"):
        main(["--dataset", "digits", "--pairs", "resnet20-resnet8", "--detach"])


def test_a_missing_program_is_one_line(monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no Slurm on the path"):
        import_submitit()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="--slurm needs submitit: pip install submitit"):
        import_submitit()


class FakeSlurm:
    """Stands in for submitit: takes tasks, and gives its jobs the states that a test wants."""

    def __init__(self, monkeypatch):
        self.states: dict[str, str] = {}
        self.submitted: list[tuple[list[str], str | None]] = []
        self.problem: UserError | None = None
        monkeypatch.setattr(slurm, "import_submitit", lambda: SimpleNamespace(SlurmJob=lambda logs, job: self.job(job)))
        monkeypatch.setattr(slurm, "submit", self.submit)
        monkeypatch.setattr(slurm, "POLL", 0)
        monkeypatch.setattr(slurm, "LOOK", 0)

    def submit(self, tasks, request, teacher, logs):
        if self.problem:
            raise self.problem
        number = len(self.submitted) + 1
        self.submitted.append((["/".join(task.job.folder.parts[-2:]) for task in tasks], teacher))
        numbers = [f"{number}_{k}" for k in range(len(tasks))] if len(tasks) > 1 else [str(number)]
        self.states |= dict.fromkeys(numbers, "PENDING")
        return [self.job(number) for number in numbers]

    def job(self, number):
        fake = self

        class Job:
            job_id = number
            paths = SimpleNamespace(stdout=Path("nowhere"))
            state = property(lambda job: fake.states.get(number, "UNKNOWN"))

            def get_info(self, mode):
                assert mode == "force"

            def done(self):
                return self.state not in ("PENDING", "RUNNING", "UNKNOWN")

        return Job()


@pytest.fixture
def fake(monkeypatch):
    return FakeSlurm(monkeypatch)


def jobs_of(root, **changes):
    names = {"dataset": "digits", "pairs": ["resnet20-resnet8"], "seeds": [1, 2], "selections": ["fixed"]}
    names |= {"distillers": ["at", "sp"], "overrides": [f"run.root={root}"]}
    return plan(**names | changes)


def queue_of(jobs, root, said=None, tick=lambda *_: None):
    return SlurmQueue(read_request([]), jobs, root / "grid", (said if said is not None else []).append, tick)


def number_of(job):
    return json.loads(Layout(job.folder).slurm_job.read_text())["job"]


def write_finished(root, job):
    shutil.rmtree(job.folder)
    assert write_run(root, selection="single", student="resnet20", seed=1, epochs=job.epochs) == job.folder


def test_students_are_an_array_that_waits_for_its_teacher(fake, tmp_path):
    jobs = jobs_of(tmp_path)
    queue = queue_of(jobs, tmp_path)
    with StopRequest() as stop:
        queue.submit(stop)
    students = ["fixed-at/resnet20-resnet8", "fixed-sp/resnet20-resnet8"]
    assert fake.submitted == [(["1/resnet20", "2/resnet20"], None), (students, "1_0"), (students, "1_1")]
    assert [number_of(job) for job in jobs] == ["1_0", "2_0", "2_1", "1_1", "3_0", "3_1"]
    assert queue.running == []
    assert Progress(jobs).line(queue.running, queue.outcomes).startswith("[0/6] left ")


def test_a_grid_that_is_started_again_submits_only_what_is_not_there(fake, tmp_path):
    jobs = jobs_of(tmp_path, seeds=[1])
    with StopRequest() as stop:
        queue_of(jobs, tmp_path).submit(stop)
        fake.states |= {"1": "COMPLETED", "2_0": "RUNNING", "2_1": "FAILED"}
        fake.submitted.clear()
        write_finished(tmp_path, jobs[0])
        assert [line.split()[0] for line in describe(jobs, tmp_path / "grid")] == ["finished", "running", "new"]
        assert describe(jobs, tmp_path / "grid")[1].endswith("(job 2_0)")
        queue = queue_of(jobs, tmp_path)
        queue.submit(stop)
    assert fake.submitted == [(["fixed-sp/resnet20-resnet8"], None)]
    assert [outcome.status for outcome in queue.outcomes.values()] == ["skipped"]


def test_how_jobs_end_is_listed_with_the_last_line_of_their_logs(fake, tmp_path):
    jobs = jobs_of(tmp_path, selections=["fixed", "single"])
    by_name = {job.name: job for job in jobs}
    ends = {"1_1": "FAILED", "1_2": "OUT_OF_MEMORY", "1_3": "CANCELLED by 0", "1_0": "COMPLETED", "2_0": "TIMEOUT"}
    steps = iter(range(100))

    def tick(running, outcomes):
        if next(steps) == 1:
            write_finished(tmp_path, by_name["resnet20 alone, seed 1"])
            Layout(by_name["resnet8 alone, seed 1"].folder).slurm_log.write_text("Traceback\nerror: out of luck\n")
            fake.states |= {number: ends.get(number, "CANCELLED by 0") for number in fake.states}

    outcomes = {outcome.job.name: outcome for outcome in queue_of(jobs, tmp_path, tick=tick).work()}
    assert fake.submitted[0][0] == ["1/resnet20", "1/resnet8", "2/resnet20", "2/resnet8"]
    pair = "resnet20-resnet8"
    found = {name: (outcome.status, outcome.reason.partition(" [")[0]) for name, outcome in outcomes.items()}
    assert found == {
        "resnet20 alone, seed 1": ("finished", ""),
        "resnet8 alone, seed 1": ("failed", "error: out of luck"),
        "resnet20 alone, seed 2": ("failed", "out of memory"),
        "resnet8 alone, seed 2": ("stopped", "job 1_3 was cancelled"),
        f"at fixed, {pair}, seed 1": ("failed", "timeout"),
        f"sp fixed, {pair}, seed 1": ("stopped", "job 2_1 was cancelled"),
        f"at fixed, {pair}, seed 2": ("not started", "its teacher failed"),
        f"sp fixed, {pair}, seed 2": ("not started", "its teacher failed"),
    }


def test_a_refusal_by_slurm_leaves_nothing(fake, tmp_path):
    jobs = jobs_of(tmp_path / "run")
    fake.problem = UserError("--slurm: sbatch: no")
    with pytest.raises(UserError, match="sbatch: no"), StopRequest() as stop:
        queue_of(jobs, tmp_path).submit(stop)
    assert not list(tmp_path.iterdir())


def test_a_damaged_note_of_a_job_counts_as_none(fake, tmp_path):
    job = jobs_of(tmp_path)[0]
    job.folder.mkdir(parents=True)
    for text in ("", "[]", '{"name": "x"}', '{"job": 3}', '{"job": "../x"}'):
        Layout(job.folder).slurm_job.write_text(text)
        assert describe([job], tmp_path / "grid")[0].startswith("new ")


class TestTask:
    """A job of the grid whose training is a Python one-liner."""

    @pytest.fixture
    def task(self, tmp_path, monkeypatch):
        monkeypatch.setattr("utils.grid.slurm_task.BUSY_SECONDS", 0)
        job = jobs_of(tmp_path)[0]

        def make(script: str, processes: int = 1) -> tuple[SlurmTask, Layout]:
            command = lambda self, *, resume: [sys.executable, "-c", script, *(["--resume"] if resume else [])]  # noqa: E731
            monkeypatch.setattr("utils.grid.plan.Job.command", command)
            return SlurmTask(job, processes), Layout(job.folder)

        return make

    def test_resumes_the_run_that_is_there_and_keeps_the_last_line(self, task):
        task, run = task("import sys; print(sys.argv[1:], flush=True); sys.exit(3)")
        with pytest.raises(RuntimeError, match=r"exit code 3: \[\]"):
            task()
        (run.path / "ckpt").mkdir()
        run.last.touch()
        with pytest.raises(RuntimeError, match=r"exit code 3: \['--resume'\]"):
            task()
        assert run.slurm_log.read_text() == "[]\n['--resume']\n"

    def test_that_is_submitted_twice_waits_for_the_first_and_trains_nothing(self, task, monkeypatch):
        task, run = task("raise SystemExit(3)")
        states = iter(["busy", "busy", "finished"])
        monkeypatch.setattr("utils.grid.slurm_task.state", lambda job: SimpleNamespace(status=next(states)))
        task()
        assert not run.slurm_log.exists()
        assert list(states) == []

    def test_its_processes_share_the_cpus(self, task, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", "32")
        started = []
        monkeypatch.setattr("subprocess.Popen.__init__", lambda self, *words, **options: started.append(options["env"]))
        monkeypatch.setattr("subprocess.Popen.wait", lambda self: 0)
        monkeypatch.setattr("subprocess.Popen.__del__", lambda self: None)
        for processes in (1, 4):
            task("pass", processes)[0]()
        assert [environment["OMP_NUM_THREADS"] for environment in started] == ["32", "8"]

    @pytest.mark.parametrize("saves", [False, True])
    def test_saves_before_a_time_limit_and_does_not_go_round_without_progress(self, task, saves):
        pytest.importorskip("submitit")
        script = f"""
import os, pathlib, signal, sys

def save(*_):
    if {saves}:
        pathlib.Path("FOLDER/ckpt").mkdir()
        pathlib.Path("FOLDER/ckpt/last.pth").touch()
    sys.exit({EXIT_INTERRUPTED})

signal.signal(signal.SIGUSR1, save)
os.kill(os.getppid(), signal.SIGUSR2)
signal.pause()
"""
        _, run = task("pass")
        task, run = task(script.replace("FOLDER", str(run.path)))
        answers = []
        signal.signal(signal.SIGUSR2, lambda *_: answers.append(task.checkpoint()))  # as submitit does
        with pytest.raises(RuntimeError, match=f"exit code {EXIT_INTERRUPTED}"):
            task()
        again = answers[0] and answers[0].function
        assert again is None if not saves else (again.job, again.processes, again._child) == (task.job, 1, None)
        assert last_line(run.slurm_log) == ("" if saves else NOT_ENOUGH_TIME)


SLURM = {"SLURM_JOB_ID": "1234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_NODEID": "1"}


class TestRendezvous:
    @pytest.mark.parametrize(
        ("listed", "first"),
        [("gpu1", "gpu1"), ("a,b", "a"), ("gpu[003-005,9],x", "gpu003"), ("r[1-2]n[07,9]-ib,x", "r1n07-ib")],
    )
    def test_is_at_the_first_node_of_the_job(self, listed, first):
        assert first_host(listed) == first

    def test_is_read_from_slurm_or_named_by_the_user(self):
        def found(environ):
            return list(rendezvous_of(2, environ).values())

        own = {"SLURMD_NODENAME": "gpu004"}
        assert found(SLURM | own) == ["gpu003:30634", "sakd-1234", "gpu004", {"is_host": False}]
        assert rendezvous_of(2, SLURM | {"SLURM_NODEID": "0"})["rdzv_configs"] == {"is_host": True}
        assert found({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"}) == ["127.0.0.1:5", "sakd-", "127.0.0.1"]
        assert found({"MASTER_ADDR": "192.0.2.1"}) == ["192.0.2.1:29400", "sakd-", None]

    def test_needs_to_be_of_that_many_machines(self):
        with pytest.raises(UserError, match=r"nnodes: found 3, but Slurm has started this on 2"):
            rendezvous_of(3, SLURM)


def test_the_launcher_says_what_is_wrong_with_nnodes(monkeypatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for nnodes, line in (("two", "nnodes: 'two', expected the number"), ("2", "nnodes: found 2, but MASTER_ADDR is")):
        minus_m, module, *words = handed_over("train.sh", dataset="digits", nnodes=nnodes)
        assert (minus_m, module) == ("-m", "utils.launch")
        with pytest.raises(UserError, match=line):
            launch(words)
