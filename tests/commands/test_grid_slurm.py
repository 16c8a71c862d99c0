"""The grid on Slurm as far as it goes without one: what it asks for, what it reads, and what it does with the answers.

tests/slurm has the rest, on a real one.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from made_up_runs import write_run

from utils.errors import UserError
from utils.grid import slurm, slurm_commands
from utils.grid.__main__ import main, split_overrides
from utils.grid.plan import plan
from utils.grid.progress import Progress
from utils.grid.slurm import SlurmQueue, describe, read_record
from utils.grid.slurm_commands import Entry, look_up, read_entries, read_request, require_submitit
from utils.grid.slurm_task import NOT_ENOUGH_TIME, SlurmTask, text_of
from utils.grid.slurm_task import main as work_on_task
from utils.processes.meeting import first_host, meeting_of
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest
from utils.run_folder.layout import Layout

ANSWER = """\
sakd-1|N/A|7|PENDING|Dependency
sakd-2|0|8|RUNNING|None
sakd-2|11|8|COMPLETED|None
"""


def test_words_behind_slurm_are_told_from_config_keys():
    words, overrides = split_overrides(
        ["--pairs", "a-b", "training.lr=1", "--slurm", "gpus=1", "time=1:00:00", "training.epochs=3", "--out", "y"]
    )
    assert words == ["--pairs", "a-b", "--slurm", "gpus=1", "time=1:00:00", "--out", "y"]
    assert overrides == ["training.lr=1", "training.epochs=3"]


def test_any_option_of_sbatch_passes_through():
    request = read_request(["gpus=a100:2", "cpus_per_task=4", "exclusive=true", "array=3", "signal=USR1@60"])
    assert request.at_a_time == 3
    assert request.processes == 2
    assert request.keys == {
        "requeue": True,
        "kill-on-invalid-dep": "yes",
        "gpus": "a100:2",
        "cpus-per-task": "4",
        "exclusive": True,
        "signal": "B:USR1@60",
    }
    assert read_request([]).keys["signal"] == "B:USR1@120"


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("gpus", "found 'gpus', must be a long option of sbatch and its value"),
        ("gpus=", "found 'gpus=', must be a long option"),
        ("p=all", "found 'p=all', must be a long option"),
        ("time=1\n#SBATCH", "must be a long option"),
        ("dependency=afterok:3", "the grid sets dependency itself"),
        ("job_name=x", "the grid sets job-name itself"),
        ("array=0-3", "found array=0-3, must be the number of jobs that may run at a time"),
    ],
)
def test_a_wrong_word_for_slurm_is_one_line(word, line):
    with pytest.raises(UserError, match="--slurm: ") as error:
        read_request([word])
    assert line in str(error.value)


def test_options_that_exclude_each_other_are_refused():
    names = ["--dataset", "digits", "--pairs", "resnet20-resnet8"]
    with pytest.raises(UserError, match="--detach: only with --slurm"):
        main([*names, "--detach"])
    with pytest.raises(UserError, match=r"--jobs: not with --slurm, where array=N"):
        main([*names, "--jobs", "2", "--slurm"])


def test_squeue_is_read():
    assert read_entries(ANSWER) == {
        ("sakd-1", 0): Entry("7", "PENDING", "Dependency"),
        ("sakd-2", 0): Entry("8_0", "RUNNING", "None"),
        ("sakd-2", 11): Entry("8_11", "COMPLETED", "None"),
    }
    assert [entry.ended for entry in read_entries(ANSWER).values()] == [False, False, True]


def test_what_is_missing_is_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match="no squeue on the path"):
        look_up(["sakd-1"])
    assert look_up([]) == {}
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="--slurm needs submitit: pip install submitit"):
        require_submitit()


class FakeSlurm:
    """Stands in for the commands: takes jobs, and says of them what a test wants to hear."""

    def __init__(self, monkeypatch):
        self.entries: dict[tuple[str, int], Entry] = {}
        self.submitted: list[tuple[list[str], str | None]] = []
        self.problem = None
        monkeypatch.setattr(slurm, "require_submitit", lambda: None)
        monkeypatch.setattr(slurm, "look_up", self.look_up)
        monkeypatch.setattr(slurm, "submit", self.submit)
        monkeypatch.setattr(slurm, "POLL", 0)
        monkeypatch.setattr(slurm, "LOOK", 0)

    def look_up(self, names):
        if self.problem:
            raise self.problem
        names = set(names)
        return {key: entry for key, entry in self.entries.items() if key[0] in names}

    def submit(self, tasks, name, request, teacher, folder):
        if self.problem:
            raise self.problem
        number = str(len(self.submitted) + 1)
        self.submitted.append((["/".join(Path(task.folder).parts[-2:]) for task in tasks], teacher))
        numbers = [f"{number}_{place}" for place in range(len(tasks))] if len(tasks) > 1 else [number]
        self.entries |= {(name, place): Entry(job, "PENDING", "Priority") for place, job in enumerate(numbers)}
        return numbers

    def set(self, job, state, reason="None"):
        for key, entry in self.entries.items():
            if entry.job == job:
                self.entries[key] = Entry(job, state, reason)


@pytest.fixture
def fake(monkeypatch):
    return FakeSlurm(monkeypatch)


def jobs_of(root, **changes):
    names = {"dataset": "digits", "pairs": ["resnet20-resnet8"], "seeds": [1, 2], "selections": ["fixed"]}
    names |= {"distillers": ["at", "sp"], "overrides": [f"run.root={root}"]}
    return plan(**names | changes)


def queue_of(jobs, root, said=None, tick=lambda queue: None):
    return SlurmQueue(jobs, read_request([]), root / "grid", (said if said is not None else []).append, tick)


def test_students_are_an_array_that_waits_for_its_teacher(fake, tmp_path):
    jobs = jobs_of(tmp_path)
    queue = queue_of(jobs, tmp_path)
    with StopRequest() as stop:
        queue.submit(stop)
    students = ["fixed-at/resnet20-resnet8", "fixed-sp/resnet20-resnet8"]
    assert fake.submitted == [(["1/resnet20", "2/resnet20"], None), (students, "1_0"), (students, "1_1")]
    assert [read_record(job)["job"] for job in jobs] == ["1_0", "2_0", "2_1", "1_1", "3_0", "3_1"]
    assert (len(queue.waiting), queue.running) == (6, [])
    assert Progress(6).text(queue).startswith("[0/6] left ")


def test_a_grid_that_is_started_again_submits_only_what_is_not_there(fake, tmp_path):
    jobs = jobs_of(tmp_path, seeds=[1])
    with StopRequest() as stop:
        queue_of(jobs, tmp_path).submit(stop)
        fake.set("1", "COMPLETED")
        fake.set("2_0", "RUNNING")
        fake.set("2_1", "FAILED")
        fake.submitted.clear()
        shutil.rmtree(jobs[0].folder)
        finished = write_run(tmp_path, selection="single", student="resnet20", seed=1, epochs=jobs[0].epochs)
        assert finished == jobs[0].folder
        (finished / "ckpt").mkdir()
        (finished / "ckpt/last.pth").touch()
        assert [line.split()[0] for line in describe(jobs)] == ["finished", "running", "new"]
        assert describe(jobs)[1].endswith("(job 2_0 running)")
        queue = queue_of(jobs, tmp_path)
        queue.submit(stop)
    assert fake.submitted == [(["fixed-sp/resnet20-resnet8"], None)]
    assert [outcome.status for outcome in queue.outcomes.values()] == ["skipped"]


def test_how_jobs_end_is_listed_with_the_last_line_of_their_logs(fake, tmp_path):
    jobs = jobs_of(tmp_path, selections=["fixed", "single"])
    ends = {"1_0": "COMPLETED", "1_1": "FAILED", "1_2": "OUT_OF_MEMORY", "1_3": "CANCELLED", "2_0": "COMPLETED"}
    steps = iter(range(100))

    def tick(queue):
        step = next(steps)
        if step == 0:
            fake.problem = UserError("squeue: nobody there")
        if step == 2:
            fake.problem = None
        if step == 3:
            Layout(failing.folder).slurm_log.write_text("Traceback\nerror: out of luck\n")
            for job in [entry.job for entry in fake.entries.values()]:
                fake.set(job, ends.get(job, "CANCELLED"))

    said = []
    failing = next(job for job in jobs if job.name == "resnet8 alone, seed 1")
    outcomes = {outcome.job.name: outcome for outcome in queue_of(jobs, tmp_path, said, tick).work()}
    assert fake.submitted[0][0] == ["1/resnet20", "1/resnet8", "2/resnet20", "2/resnet8"]
    assert outcomes["resnet20 alone, seed 1"].status == "finished"
    assert (outcomes["resnet8 alone, seed 1"].status, outcomes["resnet20 alone, seed 2"].status) == ("failed", "failed")
    assert outcomes["resnet8 alone, seed 1"].reason.startswith("error: out of luck [")
    assert outcomes["resnet20 alone, seed 2"].reason == "out of memory"
    assert outcomes["resnet8 alone, seed 2"].reason == "job 1_3 was cancelled"
    assert outcomes["at fixed, resnet20-resnet8, seed 1"].status == "finished"
    assert outcomes["sp fixed, resnet20-resnet8, seed 1"].status == "stopped"
    assert outcomes["at fixed, resnet20-resnet8, seed 2"].reason == "its teacher failed"
    assert said.count("squeue: nobody there; asking again until it answers") == 1


def test_what_slurm_refuses_leaves_nothing(fake, tmp_path):
    jobs = jobs_of(tmp_path / "run")
    fake.problem = UserError("--slurm: sbatch: no")
    with pytest.raises(UserError, match="sbatch: no"), StopRequest() as stop:
        queue_of(jobs, tmp_path).submit(stop)
    assert not list(tmp_path.iterdir())


def test_a_damaged_note_of_a_job_counts_as_none(tmp_path):
    job = jobs_of(tmp_path)[0]
    job.folder.mkdir(parents=True)
    for text in ("", "[]", '{"name": "x", "place": -1, "job": null}', '{"name": 3}'):
        Layout(job.folder).slurm_job.write_text(text)
        assert read_record(job) is None


class TestTask:
    """A job of the grid whose training is a Python one-liner, and whose Slurm is two scripts."""

    @pytest.fixture
    def work(self, tmp_path, monkeypatch):
        def work(script: str, state: str = "RUNNING") -> tuple[int, str, str]:
            calls = tmp_path / "calls"
            for name, says in (("squeue", f"echo {state}"), ("scontrol", f'echo "$@" >> {calls}')):
                (tmp_path / name).write_text(f"#!/bin/sh\n{says}\n")
                (tmp_path / name).chmod(0o755)
            monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
            monkeypatch.setenv("SLURM_JOB_ID", "31")
            monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
            run = Layout(tmp_path / "run")
            tasks = [SlurmTask(["false"], "nowhere"), SlurmTask([sys.executable, "-c", script], str(run.path))]
            (tmp_path / "tasks.json").write_text(text_of(tasks))
            code = work_on_task(tmp_path / "tasks.json")
            return code, run.slurm_log.read_text(), calls.read_text() if calls.exists() else ""

        return work

    def test_resumes_what_is_there_and_keeps_the_exit_code(self, work, tmp_path):
        script = "import sys; print(sys.argv[1:], flush=True); sys.exit(3)"
        assert work(script) == (3, "[]\n", "")
        (tmp_path / "run/ckpt").mkdir()
        (tmp_path / "run/ckpt/last.pth").touch()
        assert work(script) == (3, "[]\n['--resume']\n", "")

    def test_its_processes_share_the_cpus(self, tmp_path, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", "32")
        run = Layout(tmp_path / "run")
        script = "import os; print(os.environ['OMP_NUM_THREADS'])"
        for processes in (1, 4):
            assert SlurmTask([sys.executable, "-c", script], str(run.path), processes).work() == 0
        assert run.slurm_log.read_text() == "32\n8\n"

    def test_goes_back_into_the_queue_unless_it_is_being_cancelled(self, work):
        script = f"raise SystemExit({EXIT_INTERRUPTED})"
        assert work(script, "COMPLETING") == (EXIT_INTERRUPTED, "", "")
        assert work(script) == (EXIT_INTERRUPTED, "", "requeue 31\n")

    @pytest.mark.parametrize("saves", [False, True])
    def test_hands_the_signal_of_a_time_limit_on_and_does_not_go_round_without_progress(self, work, tmp_path, saves):
        script = f"""
import os, signal, sys

def save(*_):
    if {saves}:
        os.makedirs({str(tmp_path / "run/ckpt")!r})
        open({str(tmp_path / "run/ckpt/last.pth")!r}, "x").close()
    sys.exit({EXIT_INTERRUPTED})

signal.signal(signal.SIGUSR1, save)
os.kill(os.getppid(), signal.SIGUSR1)
signal.pause()
"""
        code, log, calls = work(script)
        assert code == EXIT_INTERRUPTED
        assert (log, calls) == (("", "requeue 31\n") if saves else (NOT_ENOUGH_TIME + "\n", ""))


SLURM = {"SLURM_JOB_ID": "1234", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[003-004]", "SLURM_NODEID": "1"}


class TestMeeting:
    @pytest.mark.parametrize(
        ("listed", "first"),
        [("gpu1", "gpu1"), ("a,b", "a"), ("gpu[003-005,9],x", "gpu003"), ("r[1-2]n[07,9]-ib,x", "r1n07-ib")],
    )
    def test_is_at_the_first_node_of_the_job(self, listed, first):
        assert first_host(listed) == first

    def test_is_read_from_slurm_or_named_by_the_user(self):
        own = {"SLURMD_NODENAME": "gpu004"}
        assert meeting_of(2, SLURM | own) == ("gpu003:30634", "sakd-1234", "gpu004", False)
        assert meeting_of(2, SLURM | {"SLURM_NODEID": "0"}).is_host
        named = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"}
        assert meeting_of(2, named) == ("127.0.0.1:5", "sakd-", "127.0.0.1", None)
        assert meeting_of(2, {"MASTER_ADDR": "192.0.2.1"}) == ("192.0.2.1:29400", "sakd-", None, None)

    def test_needs_to_be_known_and_of_that_many_machines(self):
        with pytest.raises(UserError, match=r"nnodes: found 2, but nothing says where the machines meet"):
            meeting_of(2, {})
        with pytest.raises(UserError, match=r"nnodes: found 3, but Slurm has started this on 2"):
            meeting_of(3, SLURM)


def test_the_launcher_says_what_is_wrong_with_nnodes():
    def line(**variables):
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "dataset": "digits"} | variables
        root = Path(slurm_commands.__file__).parents[2]
        run = subprocess.run(
            [shutil.which("sh"), "train.sh"], cwd=root, env=environment, capture_output=True, text=True
        )
        return run.returncode, run.stderr

    assert line(nnodes="two") == (2, "error: nnodes: 'two', expected the number of machines, 1 or more\n")
    code, text = line(nnodes="2")
    assert code == 2
    assert text.startswith("error: nnodes: found 2, but nothing says where the machines meet")


def test_slurms_signal_is_a_stop_signal():
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
    assert stop.requested
