"""Runs jobs on this machine, each in a process of its own, so that none can take the others down."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import IO

from utils.grid.plan import Job, state
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest

POLL = 0.2  # seconds between two looks at signals
BUSY_SECONDS = 5.0  # between two looks at a run that another process trains
DONE = ("finished", "skipped")


@dataclass(frozen=True)
class Outcome:
    """How a job went.

    Attributes:
        status: ``finished``; ``skipped``, finished before; ``failed``; ``stopped``, asked to by the user, saved;
            ``not started``.
        reason: the last line of an error, or why it was not started.
    """

    job: Job
    status: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.status}: {self.job.name}" + (f": {self.reason}" if self.reason else "")


class Pool:
    """Works through jobs, teachers before the students that need them.

    Two grids on one root share the work: the log of a run is locked by the process that writes to it. A job whose run
    another process trains is looked at again until that process has ended.

    Args:
        jobs: in the order in which they should run.
        slots: environment of each process that may run at a time, e.g. ``{"CUDA_VISIBLE_DEVICES": "0"}``.
        logs: folder for the output of the processes, a file for each run.
        say: called with a line whenever a job starts or ends.
        tick: called several times a second, with the running jobs and the outcomes of those that have ended.

    Attributes:
        running: the jobs whose processes run.
        outcomes: of the jobs that have ended, by their folders.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[dict[str, str]],
        logs: Path,
        say: Callable[[str], None],
        tick: Callable[[Sequence[Job], Mapping[Path, Outcome]], None],
    ):
        self.jobs, self.slots, self.logs, self.say, self.tick = list(jobs), list(slots), logs, say, tick
        self.outcomes: dict[Path, Outcome] = {}
        self._free: SimpleQueue[dict[str, str]] = SimpleQueue()
        for slot in slots:
            self._free.put(slot)
        self._folders = {job.folder for job in jobs}
        self._waiting = {job.folder: job for job in jobs}
        self._look_again: dict[Path, float] = {}  # when, at a run that another process trains
        self._processes: dict[Path, subprocess.Popen] = {}
        self._lock = Lock()  # no process starts while all are told to stop
        self._stopping = False

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.folder in self._processes]

    def work(self) -> list[Outcome]:
        """Run everything. On SIGINT, SIGTERM or an error here, the running jobs save themselves and stop."""
        futures: dict[Future[Outcome | None], Job] = {}
        with ThreadPoolExecutor(len(self.slots)) as executor, StopRequest() as stop:
            try:
                try:
                    while (self._waiting or futures) and not stop.requested:
                        for job in self._ready():
                            del self._waiting[job.folder]
                            futures[executor.submit(self._run, job)] = job
                        self._collect(futures)
                        self.tick(self.running, self.outcomes)
                finally:
                    self._stop()
                    while futures:
                        self._collect(futures)
            except BaseException:  # a second Ctrl-C, or an error while stopping: leave no process behind
                for process in list(self._processes.values()):
                    process.kill()
                raise
        for job in self._waiting.values():
            self._note(Outcome(job, "not started", "the grid was stopped"))
        return [self.outcomes[job.folder] for job in self.jobs]

    def _ready(self) -> list[Job]:
        """The waiting jobs that need not wait; those whose teacher is missing are noted as not started."""
        ready = []
        for job in list(self._waiting.values()):
            teacher = self.outcomes.get(job.teacher)
            if teacher and teacher.status not in DONE:
                del self._waiting[job.folder]
                self._note(Outcome(job, "not started", f"its teacher {teacher.status}"))
            elif job.teacher in self._folders and teacher is None:
                continue
            elif self._look_again.get(job.folder, 0) <= time.monotonic():
                ready.append(job)
        return ready

    def _collect(self, futures: dict[Future[Outcome | None], Job]) -> None:
        """Note the outcomes of jobs that have ended; wait a moment if none has."""
        if not futures:
            time.sleep(POLL)
        for future in wait(futures, POLL, FIRST_COMPLETED).done:
            job = futures.pop(future)
            outcome = None if future.cancelled() else future.result()
            if outcome is not None:
                self._note(outcome)
                continue
            if job.folder not in self._look_again and not self._stopping:
                self.say(f"waiting: {job.name}: another process trains it")
            self._look_again[job.folder] = time.monotonic() + BUSY_SECONDS
            self._waiting[job.folder] = job

    def _run(self, job: Job) -> Outcome | None:
        """Train one run to its end, in a thread; None if another process trains it."""
        if self._stopping:
            return None
        found = state(job)
        if found.status in ("new", "unfinished"):
            self.logs.mkdir(parents=True, exist_ok=True)
            log = self.logs / ("-".join(job.folder.relative_to(self.logs.parent).parts) + ".txt")
            with log.open("ab") as output:
                # Another grid may have trained it between the look and the lock.
                if not _lock(output) or (found := state(job)).status == "busy":
                    return None
                if found.status != "finished":
                    output.truncate(0)
                    return self._train(job, found.status == "unfinished", found.differs, output)
        if found.status == "busy":
            return None
        if found.status == "unreadable":
            return Outcome(job, "failed", found.differs)
        return Outcome(job, "skipped", found.differs and f"finished with other settings: {found.differs}")

    def _train(self, job: Job, resume: bool, differs: str, output: IO[bytes]) -> Outcome | None:
        slot = self._free.get()
        try:
            with self._lock:
                if self._stopping:
                    return None
                # In a session of its own, the process does not see a Ctrl-C that is meant for the grid. It inherits the
                # locked log: the lock ends with the run, even if the grid is killed.
                process = self._processes[job.folder] = subprocess.Popen(
                    job.command(resume=resume),
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    env=os.environ | slot,
                    start_new_session=True,
                )
            self.say(f"{'resume' if resume else 'start'}: {job.name}" + (f" ({differs})" if differs else ""))
            code = process.wait()
        finally:
            self._processes.pop(job.folder, None)
            self._free.put(slot)
        if code == 0:
            return Outcome(job, "finished")
        if code == EXIT_INTERRUPTED or self._stopping:  # a run that was still starting has nothing to save
            return Outcome(job, "stopped")
        log = Path(output.name)
        return Outcome(job, "failed", f"{last_line(log) or f'exit code {code}'} [{log}]")

    def _stop(self) -> None:
        """Let the running jobs save themselves, and start no other."""
        with self._lock:
            self._stopping = True
            for process in self._processes.values():
                process.send_signal(signal.SIGTERM)
        if self._processes:
            self.say("stopping: the running jobs finish their step and save themselves (again Ctrl-C: at once)")

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[outcome.job.folder] = outcome
        self.say(str(outcome))


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
