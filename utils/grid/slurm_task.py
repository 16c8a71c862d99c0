"""The training of one run, as a Slurm job of the grid calls it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING

from utils.grid.plan import Job, state
from utils.grid.pool import BUSY_SECONDS, last_line
from utils.processes.rank import thread_share
from utils.processes.stopping import EXIT_INTERRUPTED
from utils.run_folder.layout import Layout

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

NOT_ENOUGH_TIME = "error: the time limit came before anything could be saved; --slurm time=... asks for more"


class SlurmTask:
    """Trains one run in a Slurm job; submitit pickles it. A second job for the same run waits and finds it finished.

    Args:
        job: the run.
        processes: that share each batch.
    """

    def __init__(self, job: Job, processes: int = 1):
        self.job, self.processes = job, processes
        self._child: subprocess.Popen | None = None
        self._saved: int | None = None  # when the last checkpoint was written, before this job

    def __call__(self) -> None:
        """Train the run, or go on with it. Slurm's SIGTERM saves it and ends this process.

        Raises:
            RuntimeError: the training failed; its last line.
        """
        signal.signal(signal.SIGTERM, self._end)
        while (found := state(self.job)).status == "busy":
            time.sleep(BUSY_SECONDS)
        if found.status == "finished":
            return
        layout = Layout(self.job.folder)
        self._saved = _last_saved(layout)
        layout.path.mkdir(parents=True, exist_ok=True)
        python, *words = self.job.command(resume=found.status == "unfinished")
        if self.processes > 1:
            words = ["-m", "utils.launch", str(self.processes), *words]
        share = thread_share(self.processes, cores=int(os.environ.get("SLURM_CPUS_ON_NODE", "1")))
        with layout.slurm_log.open("ab") as log:
            self._child = subprocess.Popen(
                [python, *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | share,
            )
        if code := self._child.wait():
            raise RuntimeError(f"exit code {code}: {last_line(layout.slurm_log)}")

    def checkpoint(self) -> DelayedSubmission | None:
        """Called by submitit before the time limit: save, and go back into the queue.

        Returns:
            what the job does next time; None, which fails the job, if it would go round without progress.
        """
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._stop_child(signal.SIGUSR1)
            layout = Layout(self.job.folder)
            if _last_saved(layout) == self._saved:
                with layout.slurm_log.open("a") as log:
                    log.write(NOT_ENOUGH_TIME + "\n")
                return None
        return DelayedSubmission(SlurmTask(self.job, self.processes))

    def _stop_child(self, number: int) -> None:
        self._child.send_signal(number)
        with suppress(ChildProcessError):  # it has ended
            # Not `Popen.wait`: the signal that led here has interrupted it.
            os.waitid(os.P_PID, self._child.pid, os.WEXITED | os.WNOWAIT)

    def _end(self, number: int, frame: FrameType | None) -> None:
        """The job is cancelled, or Slurm puts it back into its queue: end without a result."""
        if self._child is not None:
            self._stop_child(number)
        os._exit(EXIT_INTERRUPTED)


def _last_saved(layout: Layout) -> int | None:
    with suppress(OSError):
        return layout.last.stat().st_mtime_ns
    return None
