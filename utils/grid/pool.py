"""Runs jobs on this machine, each in a process of its own, so that none can take the others down."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from utils.grid.plan import Job, State, state
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest

POLL = 0.1  # seconds between two looks at the processes
BUSY_SECONDS = 5.0  # between two looks at a run that another process trains
DONE = ("finished", "skipped")


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        status: ``finished``; ``skipped``, finished before; ``failed``; ``stopped``, asked to by the user, saved;
            ``not started``; ``in Slurm's queue``, where it goes on.
        reason: the last line of an error, or why it was not started.
    """

    job: Job
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.job.name}" + (f": {self.reason}" if self.reason else "")


class Queue:
    """What works through jobs, here or on Slurm.

    Args:
        jobs: in the order in which they should run, teachers before the students that need them.
        logs: folder for what they print.
        say: called with a line whenever something changes.
        tick: called several times a second, with the running jobs and the outcomes of those that have ended.

    Attributes:
        outcomes: of the jobs that have ended, by their folders.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        logs: Path,
        say: Callable[[str], None],
        tick: Callable[[Sequence[Job], Mapping[Path, Outcome]], None],
    ):
        self.jobs, self.logs, self.say, self.tick = list(jobs), logs, say, tick
        self.outcomes: dict[Path, Outcome] = {}

    def note(self, job: Job, status: str, reason: str = "") -> None:
        """A job has ended so, see `Outcome`."""
        self.outcomes[job.folder] = Outcome(job, status, reason)
        self.say(str(self.outcomes[job.folder]))


class _Running(NamedTuple):
    job: Job
    process: subprocess.Popen
    slot: dict[str, str]
    log: Path


class Pool(Queue):
    """Runs jobs here.

    Two grids on one root share the work: the log of a run is locked by the process that writes to it. A job whose run
    another process trains is looked at again until that process has ended.

    Args:
        slots: environment of each process that may run at a time, e.g. ``{"CUDA_VISIBLE_DEVICES": "0"}``.
        arguments: of a `Queue`.
    """

    def __init__(self, slots: Sequence[dict[str, str]], *arguments: Any):
        super().__init__(*arguments)
        self._free, self._running = list(slots), list[_Running]()
        self._waiting = {job.folder: job for job in self.jobs}
        self._look_again: dict[Path, float] = {}  # when, at a run that another process trains

    def work(self) -> list[Outcome]:
        """Run everything. On a stop signal or an error here, the running jobs save themselves and stop."""
        with StopRequest() as stop:
            try:
                try:
                    while (self._waiting or self._running) and not stop.requested:
                        for job in self._ready():
                            if not stop.requested:
                                self._begin(job)
                        time.sleep(POLL)
                        self._collect(stopped=stop.requested)
                        self.tick([one.job for one in self._running], self.outcomes)
                finally:
                    self._stop()
            except BaseException:  # a second Ctrl-C, or an error while stopping: leave no process behind
                for one in self._running:
                    one.process.kill()
                raise
        for job in list(self._waiting.values()):
            self.note(job, "not started", "the grid was stopped")
        return [self.outcomes[job.folder] for job in self.jobs]

    def _ready(self) -> Iterator[Job]:
        """The jobs that can begin now, while there is room; those whose teacher is missing are noted as not started."""
        folders = {job.folder for job in self.jobs}
        for job in list(self._waiting.values()):
            teacher = self.outcomes.get(job.teacher)
            if teacher and teacher.status not in DONE:
                self.note(job, "not started", f"its teacher {teacher.status}")
            elif job.teacher in folders and teacher is None:
                continue
            elif self._free and self._look_again.get(job.folder, 0) <= time.monotonic():
                yield job

    def _begin(self, job: Job) -> None:
        """Start the process of a job, unless its run is finished, or another process trains it."""
        found = state(job)
        if found.status in ("new", "unfinished"):
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self.logs / ("-".join(job.folder.relative_to(self.logs.parent).parts) + ".txt")
            with log.open("ab") as output:
                # Another grid may have trained it between the look and the lock.
                if not _lock(output) or (found := state(job)).status == "busy":
                    found = State("busy")
                elif found.status != "finished":
                    output.truncate(0)
                    self._train(job, found, output, log)
                    return
        if found.status == "busy":
            if job.folder not in self._look_again:
                self.say(f"waiting: {job.name}: another process trains it")
            self._look_again[job.folder] = time.monotonic() + BUSY_SECONDS
        elif found.status == "unreadable":
            self.note(job, "failed", found.differs)
        else:
            self.note(job, "skipped", found.differs and f"finished with other settings: {found.differs}")

    def _train(self, job: Job, found: State, output: IO[bytes], log: Path) -> None:
        resume, slot = found.status == "unfinished", self._free.pop(0)
        # In a session of its own, the process does not see a Ctrl-C that is meant for the grid. It inherits the locked
        # log: the lock ends with the run, even if the grid is killed.
        process = subprocess.Popen(
            job.command(resume=resume),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | slot,
            start_new_session=True,
        )
        del self._waiting[job.folder]
        self._running.append(_Running(job, process, slot, log))
        self.say(f"{'resume' if resume else 'start'}: {job.name}" + (f" ({found.differs})" if found.differs else ""))

    def _collect(self, stopped: bool) -> None:
        """Note the outcomes of the processes that have ended.

        Args:
            stopped: they were asked to stop; a run that was still starting has nothing to save, and fails.
        """
        for one in [one for one in self._running if one.process.poll() is not None]:
            self._running.remove(one)
            self._free.append(one.slot)
            code = one.process.poll()
            if code == 0:
                self.note(one.job, "finished")
            elif code == EXIT_INTERRUPTED or stopped:
                self.note(one.job, "stopped")
            else:
                why = f"killed by signal {-code}" if code < 0 else last_line(one.log) or f"exit code {code}"
                self.note(one.job, "failed", f"{why} [{one.log}]")

    def _stop(self) -> None:
        """Let the running jobs save themselves, and wait for them."""
        for one in self._running:
            one.process.send_signal(signal.SIGTERM)
        if self._running:
            self.say("stopping: the running jobs finish their step and save themselves (again Ctrl-C: at once)")
        while self._running:
            time.sleep(POLL)
            self._collect(stopped=True)

    def note(self, job: Job, status: str, reason: str = "") -> None:
        self._waiting.pop(job.folder, None)
        super().note(job, status, reason)


def _lock(file: IO[bytes]) -> bool:
    """Lock a file for as long as this process or a child has it open; False if another process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # of another kind on a file system without locks
        return not isinstance(error, BlockingIOError)
    return True


def last_line(log: Path) -> str:
    """The last line with text in it; in a traceback, that is the error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
