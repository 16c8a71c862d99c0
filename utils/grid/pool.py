"""Runs jobs as processes of their own, so that none can take the others down."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from utils.grid.plan import Job, state
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest

POLL = 0.2  # seconds
DONE = ("finished", "skipped")


@dataclass
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


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    log: Path
    slot: int
    output: IO[bytes]


class Pool:
    """Works through jobs, teachers before those that need them.

    Args:
        jobs: in the order in which they should run.
        slots: environment of each process that may run at a time, e.g. ``{"CUDA_VISIBLE_DEVICES": "0"}``.
        logs: folder for what the processes print.
        say: called with a line whenever a job starts or ends.
        tick: called several times a second.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        slots: Sequence[dict[str, str]],
        logs: Path,
        say: Callable[[str], None],
        tick: Callable[[Pool], None],
    ):
        self.jobs, self.slots, self.logs, self.say, self.tick = list(jobs), list(slots), logs, say, tick
        self.waiting = list(jobs)
        self._folders = {job.folder for job in jobs}
        self.running: list[_Running] = []
        self.outcomes: dict[Path, Outcome] = {}
        self.stopping = False

    def work(self) -> list[Outcome]:
        """Run everything. On SIGINT, SIGTERM or an error here, the running jobs save themselves and stop."""
        try:
            with StopRequest() as stop:
                try:
                    while (self.waiting or self.running) and not stop.requested:
                        self._start_ready()
                        self._reap()
                        self.tick(self)
                        time.sleep(POLL if self.running else 0)
                except Exception:
                    self._stop_running()
                    raise
                self._stop_running()
        except BaseException:  # a second Ctrl-C, or one more error: leave no process behind
            for item in self.running:
                item.process.kill()
            raise
        for job in self.waiting:
            self._note(job, "not started", "the grid was stopped")
        return [self.outcomes[job.folder] for job in self.jobs]

    def _start_ready(self) -> None:
        for job in list(self.waiting):
            if len(self.running) == len(self.slots):
                return
            teacher = self.outcomes.get(job.teacher) if job.teacher else None
            if teacher is None and job.teacher in self._folders:
                continue  # its teacher is not through yet
            self.waiting.remove(job)
            if teacher is not None and teacher.status not in DONE:
                self._note(job, "not started", f"its teacher {teacher.status}")
            else:
                self._start(job)

    def _start(self, job: Job) -> None:
        found = state(job)
        if found.status == "finished":
            self._note(job, "skipped", found.differs and f"finished with other settings: {found.differs}")
            return
        if found.status == "busy":
            self._note(job, "not started", "another process is at it")
            return
        slot = next(k for k in range(len(self.slots)) if k not in {item.slot for item in self.running})
        resume = found.status == "unfinished"
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / ("-".join(job.folder.relative_to(job.config.run.root).parts) + ".txt")
        output = log.open("wb")
        # In a session of its own, it does not see a Ctrl-C that is meant for the grid.
        process = subprocess.Popen(
            job.command(resume=resume),
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | self.slots[slot],
            start_new_session=True,
        )
        self.running.append(_Running(job, process, log, slot, output))
        self.say(f"{'resume' if resume else 'start'}: {job.name}" + (f" ({found.differs})" if found.differs else ""))

    def _reap(self) -> None:
        for item in list(self.running):
            code = item.process.poll()
            if code is None:
                continue
            self.running.remove(item)
            item.output.close()
            if code == 0:
                self._note(item.job, "finished")
            elif code == EXIT_INTERRUPTED or self.stopping:  # one that was still starting has nothing to save
                self._note(item.job, "stopped")
            else:
                self._note(item.job, "failed", f"{last_line(item.log) or f'exit code {code}'} [{item.log}]")

    def _stop_running(self) -> None:
        if not self.running:
            return
        self.stopping = True
        for item in self.running:
            item.process.send_signal(signal.SIGTERM)
        self.say("stopping: the running jobs finish their step and save themselves (again Ctrl-C: at once)")
        while self.running:
            self._reap()
            time.sleep(POLL)

    def _note(self, job: Job, status: str, reason: str = "") -> None:
        self.outcomes[job.folder] = Outcome(job, status, reason)
        self.say(f"{status}: {job.name}" + (f": {reason}" if reason else ""))


def last_line(log: Path) -> str:
    """The last line that says something; that of a traceback is the error."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "")
