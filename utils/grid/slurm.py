"""Hands jobs to Slurm and watches them, with the face of `utils.grid.pool.Pool`.

A file in every run's folder says under which name it was submitted, written before that is done: a grid that is killed
and started again asks Slurm for these names, and watches what is there instead of submitting it twice.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import NonNegativeInt, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from utils.errors import UserError
from utils.files import write_text
from utils.grid.plan import Job, State, state
from utils.grid.pool import DONE, Outcome, last_line
from utils.grid.slurm_commands import Entry, Request, batch_log, look_up, require_submitit, submit
from utils.grid.slurm_task import SlurmTask
from utils.processes.stopping import StopRequest
from utils.run_folder.layout import Layout

POLL = 0.2  # seconds between two looks at signals
LOOK = 5.0  # seconds between two questions to Slurm, which answers many people
IN_SLURM = "in Slurm's queue"


class Record(TypedDict):
    """``slurm.json`` of a run: under which name it was submitted, and its place in the array."""

    name: str
    place: NonNegativeInt
    job: str | None


@dataclass
class _Submitted:
    job: Job
    record: Record
    entry: Entry


class SlurmQueue:
    """Jobs in Slurm's queue. Students wait there for their teachers.

    Args:
        jobs: teachers before their students.
        request: what each job asks for.
        logs: folder for submitit's files.
        say: called with a line whenever something changes.
        tick: called several times a second.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        request: Request,
        logs: Path,
        say: Callable[[str], None],
        tick: Callable[[SlurmQueue], None],
    ):
        self.jobs, self.request, self.logs, self.say, self.tick = list(jobs), request, logs.absolute(), say, tick
        self.outcomes: dict[Path, Outcome] = {}
        self._submitted: dict[Path, _Submitted] = {}
        self._answers = True

    @property
    def running(self) -> list[_Submitted]:
        return [item for item in self._submitted.values() if item.entry.state == "RUNNING"]

    @property
    def waiting(self) -> list[Job]:
        return [item.job for item in self._submitted.values() if item.entry.state != "RUNNING"]

    @property
    def slots(self) -> list[object]:
        """As many as run at a time, as far as that is known."""
        return list(self.running) or [None]

    def work(self) -> list[Outcome]:
        """Submit what is not there and watch until all is through. SIGINT and SIGTERM end the watching alone."""
        with StopRequest() as stop:
            self.submit(stop)
            looked = time.monotonic()
            while self._submitted and not stop.requested:
                if time.monotonic() - looked >= LOOK:
                    self._look()
                    looked = time.monotonic()
                self.tick(self)
                time.sleep(POLL)
        for item in list(self._submitted.values()):
            self.outcomes[item.job.folder] = Outcome(item.job, IN_SLURM, _words(item.entry))
        return [self.outcomes.get(job.folder, Outcome(job, "not started", "the grid was stopped")) for job in self.jobs]

    def submit(self, stop: StopRequest) -> None:
        """Hand over what is neither finished nor in the queue: an array, then one for each teacher's students.

        Raises:
            UserError: submitit or Slurm is missing, or Slurm refuses the jobs.
        """
        require_submitit()
        groups: dict[Path | None, list[Job]] = {None: []}
        for job, entry, found in look(self.jobs):
            teacher = next((other for other in self.jobs if other.folder == job.teacher), None)
            ending = self.outcomes.get(teacher.folder) if teacher else None
            if entry is not None:
                record = read_record(job)
                self._submitted[job.folder] = _Submitted(job, record, entry)
                self.say(f"{_words(entry)}: {job.name}")
            elif found.status == "finished":
                self._note(job, "skipped", found.differs and f"finished with other settings: {found.differs}")
            elif found.status == "busy":
                self._note(job, "not started", "another process is at it")
            elif ending and ending.status not in DONE:
                self._note(job, "not started", f"its teacher {ending.status}")
            else:
                groups.setdefault(teacher.folder if teacher and not ending else None, []).append(job)
        for teacher, jobs in groups.items():
            if jobs and not stop.requested:
                self._hand_over(jobs, teacher)

    def _hand_over(self, jobs: Sequence[Job], teacher: Path | None) -> None:
        name = f"sakd-{uuid.uuid4().hex[:12]}"
        records = [Record(name=name, place=place, job=None) for place in range(len(jobs))]
        try:
            for job, record in zip(jobs, records):
                job.folder.mkdir(parents=True, exist_ok=True)
                _write(job, record)
            tasks = [SlurmTask(self._command(job), str(job.folder.absolute()), self.request.processes) for job in jobs]
            first = self._submitted[teacher].entry.job if teacher else None
            numbers = submit(tasks, name, self.request, first, self.logs)
        except (UserError, OSError):
            for job in jobs:
                _forget(job)
            raise
        for job, record, number in zip(jobs, records, numbers):
            _write(job, record | {"job": number})
            self._submitted[job.folder] = _Submitted(job, record, Entry(number, "PENDING", ""))
            self.say(f"submitted: {job.name} (job {number})")

    def _command(self, job: Job) -> tuple[str, ...]:
        python, *words = job.command(resume=False)
        if self.request.processes > 1:
            words = ["-m", "utils.launch", str(self.request.processes), *words]
        return python, *words

    def _look(self) -> None:
        """Ask Slurm, and say what has changed."""
        try:
            entries = look_up(item.record["name"] for item in self._submitted.values())
        except UserError as error:  # Slurm is restarted now and then; its jobs go on
            if self._answers:
                self.say(f"{error}; asking again until it answers")
            self._answers = False
            return
        self._answers = True
        for item in list(self._submitted.values()):
            entry = entries.get((item.record["name"], item.record["place"]))
            if entry is None or entry.ended:
                del self._submitted[item.job.folder]
                self._conclude(item.job, item.entry.job, entry)
            else:
                if entry.state != item.entry.state and entry.state in ("RUNNING", "PENDING"):
                    self.say(f"{_words(entry)}: {item.job.name}")
                item.entry = entry

    def _conclude(self, job: Job, number: str, entry: Entry | None) -> None:
        ending = entry.state if entry else ""
        teacher = self.outcomes.get(job.teacher) if job.teacher else None
        if ending == "COMPLETED" or state(job).status == "finished":
            self._note(job, "finished")
        elif teacher and teacher.status not in DONE:  # Slurm has cancelled it
            self._note(job, "not started", f"its teacher {teacher.status}")
        elif ending in ("CANCELLED", "PREEMPTED"):
            self._note(job, "stopped", f"job {number} was {ending.lower()}")
        else:
            how = {"": "no longer in Slurm's queue", "FAILED": ""}.get(ending, ending.lower().replace("_", " "))
            self._note(job, "failed", ": ".join(filter(None, [how, self._last_words(job, number)])))

    def _last_words(self, job: Job, number: str) -> str:
        for log in (Layout(job.folder).slurm_log, batch_log(self.logs, number)):
            if log.exists() and (line := last_line(log)):
                return f"{line} [{log}]"
        return ""

    def _note(self, job: Job, status: str, reason: str = "") -> None:
        self.outcomes[job.folder] = Outcome(job, status, reason)
        self.say(f"{status}: {job.name}" + (f": {reason}" if reason else ""))


def look(jobs: Sequence[Job]) -> list[tuple[Job, Entry | None, State]]:
    """Every job with its entry in Slurm's queue, None if it is not there or has ended, and what its folder says."""
    records = {job.folder: read_record(job) for job in jobs}
    entries = look_up(record["name"] for record in records.values() if record)
    found = []
    for job in jobs:
        record = records[job.folder]
        entry = entries.get((record["name"], record["place"])) if record else None
        found.append((job, None if entry is None or entry.ended else entry, state(job)))
    return found


def describe(jobs: Sequence[Job]) -> list[str]:
    """A line about every job, with how far it is."""
    return [
        f"{entry.state.lower() if entry else found.status:<10}  {job.name}  {job.folder}"
        + (f"  ({_words(entry)})" if entry else "")
        for job, entry, found in look(jobs)
    ]


def read_record(job: Job) -> Record | None:
    """Under which name a run was submitted last; None if it never was, or that cannot be read."""
    with suppress(OSError, ValidationError):
        return TypeAdapter(Record).validate_json(Layout(job.folder).slurm_job.read_bytes())
    return None


def _write(job: Job, record: Record) -> None:
    write_text(Layout(job.folder).slurm_job, json.dumps(record) + "\n")


def _forget(job: Job) -> None:
    """Undo what `_hand_over` has begun."""
    with suppress(OSError):
        Layout(job.folder).slurm_job.unlink()
        for folder in (job.folder, *job.folder.parents):
            folder.rmdir()  # ends at the first one that holds something


def _words(entry: Entry) -> str:
    """``"job 12_3 pending (Dependency)"``."""
    reason = f" ({entry.reason})" if entry.state == "PENDING" and entry.reason not in ("", "None") else ""
    return f"job {entry.job} {entry.state.lower()}{reason}"
