"""Hands jobs to Slurm through submitit and watches them.

``slurm.json`` in the folder of a run has the number of its job. A grid that is started again watches that job instead
of submitting the run twice; a run that is submitted twice all the same is trained once.

submitit pickles the tasks into ``grid/`` in `run.root`. Only the jobs unpickle them; the grid reads the states of jobs.
"""

from __future__ import annotations

import json
import logging
import re
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.errors import UserError
from utils.files import write_text
from utils.grid.plan import Job, State, state
from utils.grid.pool import DONE, POLL, Outcome, Queue, last_line
from utils.grid.slurm_task import SlurmTask
from utils.processes.stopping import StopRequest
from utils.run_folder.layout import Layout

if TYPE_CHECKING:
    from submitit import SlurmJob

LOOK = 5.0  # seconds between two questions to Slurm, which answers many people
IN_SLURM = "in Slurm's queue"
SIGNAL = "USR2"  # submitit's
WARNING = 120  # seconds before the time limit
HOURS = 4  # of a job without time=...; at the limit it goes back into the queue
NO_LIMIT = 10**6  # times that a job may reach its time limit
OF_THE_GRID = ("dependency", "error", "job-name", "open-mode", "output")


@dataclass(frozen=True)
class Request:
    """What every job asks Slurm for.

    Attributes:
        keys: options of ``sbatch``.
        at_a_time: jobs of one array that may run at a time; None: as many as Slurm likes.
        processes: that share each batch, one per GPU.
    """

    keys: dict[str, str | bool]
    at_a_time: int | None = None
    processes: int = 1


def read_request(words: Iterable[str], jobs: int | None = None) -> Request:
    """The ``key=value`` words behind ``--slurm``, of which ``array=N`` is another word for ``--jobs N``.

    Raises:
        UserError: a word is none of these, or the grid needs the key itself.
    """
    keys: dict[str, str | bool] = {"requeue": True, "kill-on-invalid-dep": "yes", "time": f"{HOURS}:00:00"}
    for word in words:
        name, sign, value = word.partition("=")
        key = name.replace("_", "-").lstrip("-")
        if not (sign and value and re.fullmatch("[a-z][a-z-]+", key)) or not value.isprintable():
            raise UserError(f"--slurm: found {word!r}, must be a long option of sbatch and its value, e.g. gpus=1")
        if key in OF_THE_GRID:
            raise UserError(f"--slurm: found {word!r}, but the grid sets {key} itself")
        keys[key] = True if value == "true" else value
    # B: the batch shell, which is replaced by the process that handles the signal.
    keys["signal"] = f"B:{SIGNAL}@{str(keys.get('signal', '')).rpartition('@')[2] or WARNING}"
    at_a_time = keys.pop("array", str(jobs or ""))
    if at_a_time and not re.fullmatch("[1-9][0-9]{0,4}", str(at_a_time), re.ASCII):
        raise UserError(f"--slurm: found array={at_a_time}, must be the number of jobs that may run at a time")
    gpus = str(keys.get("gpus", "1")).rpartition(":")[2]  # that may be a type before
    processes = int(gpus) if re.fullmatch("[1-9][0-9]{0,3}", gpus, re.ASCII) else 1
    return Request(keys, int(at_a_time) if at_a_time else None, processes)


class SlurmQueue(Queue):
    """Jobs in Slurm's queue. Students wait there for their teachers.

    Args:
        request: what each job asks for.
        arguments: of a `Queue`.
    """

    def __init__(self, request: Request, *arguments: Any):
        super().__init__(*arguments)
        self.request, self.logs = request, self.logs.absolute()
        self._submitted: dict[Path, SlurmJob] = {}
        self._states: dict[Path, str] = {}

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.folder in self._submitted and self._states[job.folder] == "RUNNING"]

    def work(self) -> list[Outcome]:
        """Submit what is not there and watch until all has ended. SIGINT and SIGTERM end the watching alone."""
        with StopRequest() as stop:
            self.submit(stop)
            looked = time.monotonic()
            while self._submitted and not stop.requested:
                if time.monotonic() - looked >= LOOK:
                    self._look()
                    looked = time.monotonic()
                self.tick(self.running, self.outcomes)
                time.sleep(POLL)
        for job in self.jobs:
            if job.folder in self._submitted:
                self.outcomes[job.folder] = Outcome(job, IN_SLURM, self._words(job))
        return [self.outcomes.get(job.folder, Outcome(job, "not started", "the grid was stopped")) for job in self.jobs]

    def submit(self, stop: StopRequest) -> None:
        """Hand over what is neither finished nor in the queue: an array, then one for each teacher's students.

        Raises:
            UserError: submitit or Slurm is missing, or Slurm refuses the jobs.
        """
        folders = {job.folder for job in self.jobs}
        groups: dict[Path | None, list[Job]] = {None: []}
        for job, found, there in look(self.jobs, self.logs):
            ending = self.outcomes.get(job.teacher)
            if found.status == "finished":
                self.note(job, "skipped", found.differs and f"finished with other settings: {found.differs}")
            elif found.status == "unreadable":
                self.note(job, "failed", found.differs)
            elif there is not None:
                self._submitted[job.folder], self._states[job.folder] = there, there.state
                self.say(f"{self._words(job)}: {job.name}")
            elif ending and ending.status not in DONE:
                self.note(job, "not started", f"its teacher {ending.status}")
            else:
                waits = job.teacher in folders and not ending
                groups.setdefault(job.teacher if waits else None, []).append(job)
        for teacher, jobs in groups.items():
            if not jobs or stop.requested:
                continue
            waits_for = teacher and self._submitted[teacher].job_id
            tasks = [SlurmTask(job, self.request.processes) for job in jobs]
            for job, there in zip(jobs, submit(tasks, self.request, waits_for, self.logs)):
                layout = Layout(job.folder)
                layout.path.mkdir(parents=True, exist_ok=True)
                write_text(layout.slurm_job, json.dumps({"job": there.job_id}) + "\n")
                self._submitted[job.folder], self._states[job.folder] = there, "PENDING"
                self.say(f"submitted: {job.name} (job {there.job_id})")

    def _look(self) -> None:
        """Ask Slurm, and say what has changed."""
        next(iter(self._submitted.values())).get_info(mode="force")  # of all jobs
        for job in self.jobs:
            there = self._submitted.get(job.folder)
            if there is None:
                continue
            if there.done():
                del self._submitted[job.folder]
                self._conclude(job, there)
            elif there.state != self._states[job.folder] and there.state in ("RUNNING", "PENDING"):
                self._states[job.folder] = there.state
                self.say(f"{self._words(job)}: {job.name}")

    def _conclude(self, job: Job, there: SlurmJob) -> None:
        ending = there.state.partition(" ")[0]  # CANCELLED by 0
        teacher = self.outcomes.get(job.teacher)
        if state(job).status == "finished":
            self.note(job, "finished")
        elif teacher and teacher.status not in DONE:  # Slurm has cancelled it
            self.note(job, "not started", f"its teacher {teacher.status}")
        elif ending == "CANCELLED":
            self.note(job, "stopped", f"job {there.job_id} was cancelled")
        else:
            how = "" if ending in ("FAILED", "RUNNING", "COMPLETING") else ending.lower().replace("_", " ")
            self.note(job, "failed", ": ".join(filter(None, [how, _last_words(job, there)])))

    def _words(self, job: Job) -> str:
        """``"job 12_3 pending"``."""
        return f"job {self._submitted[job.folder].job_id} {self._states[job.folder].lower()}"


def look(jobs: Sequence[Job], logs: Path) -> list[tuple[Job, State, SlurmJob | None]]:
    """Every job, how far its run is, and its Slurm job; None if there is none, or it has ended.

    Raises:
        UserError: a run was submitted, and submitit or Slurm is missing here.
    """
    there = {}
    for job in jobs:
        with suppress(OSError, ValueError, TypeError, KeyError):  # it was never submitted, or the file is damaged
            number = json.loads(Layout(job.folder).slurm_job.read_bytes())["job"]
            if re.fullmatch(r"\d+(_\d+)?", number):
                there[job.folder] = import_submitit().SlurmJob(logs.absolute(), number)
    for item in list(there.values())[:1]:
        item.get_info(mode="force")  # of all jobs
    waiting = {folder for folder, item in there.items() if item.state != "UNKNOWN" and not item.done()}
    return [(job, state(job), there[job.folder] if job.folder in waiting else None) for job in jobs]


def describe(jobs: Sequence[Job], logs: Path) -> list[str]:
    """A line about every job, with how far it is."""
    return [
        f"{there.state.lower() if there else found.status:<10}  {job.name}  {job.folder}"
        + (f"  (job {there.job_id})" if there else "")
        for job, found, there in look(jobs, logs)
    ]


def import_submitit():
    """The module.

    Raises:
        UserError: it is missing, or Slurm is.
    """
    try:
        import submitit
    except ImportError:
        raise UserError("--slurm needs submitit: pip install submitit") from None
    if submitit.SlurmExecutor.affinity() < 0:
        raise UserError("--slurm: no Slurm on the path; start the grid where jobs are submitted")
    logging.getLogger("submitit").setLevel(logging.ERROR)  # it warns while Slurm does not answer
    return submitit


def submit(tasks: Sequence[SlurmTask], request: Request, teacher: str | None, logs: Path) -> list[SlurmJob]:
    """Submit tasks, several as one array.

    Args:
        teacher: id of the job without whose success they must not start.
        logs: folder for submitit's files.

    Raises:
        UserError: submitit or Slurm is missing, or Slurm refuses the tasks.
    """
    submitit = import_submitit()
    python = f"exec {shlex.quote(sys.executable)}"  # no shell between Slurm's signals and the process
    executor = submitit.SlurmExecutor(logs, max_num_timeout=NO_LIMIT, python=python)
    executor.update_parameters(
        job_name="sakd",
        time=HOURS * 60,  # which the keys override
        use_srun=False,
        stderr_to_stdout=True,
        dependency=teacher and f"afterok:{teacher}",
        array_parallelism=request.at_a_time or len(tasks),
        additional_parameters=request.keys,
    )
    try:
        with redirect_stderr(StringIO()):  # submitit repeats there what sbatch says
            return executor.submit_array(tasks)
    except submitit.core.utils.FailedJobError as error:
        said = (str(error).strip().splitlines() or ["sbatch failed"])[0]
        raise UserError(f"--slurm: {said}") from None


def _last_words(job: Job, there: SlurmJob) -> str:
    for log in (Layout(job.folder).slurm_log, there.paths.stdout):
        if log.exists() and (line := last_line(log)):
            return f"{line} [{log}]"
    return ""
