"""What a Slurm job of the grid does: train one run, and go back into the queue if it is stopped early.

    python -m utils.grid.slurm_task tasks.json

The file lists the tasks of an array of jobs; the job's place in it says which one is meant.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from utils.processes.stopping import EXIT_INTERRUPTED, STOP_SIGNALS
from utils.run_folder.layout import Layout

NOT_ENOUGH_TIME = "error: the time limit came before anything could be saved; --slurm time=... asks for more"
NOT_REQUEUED = "error: stopped and saved, but Slurm does not put the job back into its queue: "


@dataclass(frozen=True)
class SlurmTask:
    """One run.

    Attributes:
        command: starts the training, but for ``--resume``.
        folder: of the run, absolute.
        processes: how many share the CPUs of the job.
    """

    command: Sequence[str]
    folder: str
    processes: int = 1

    def work(self) -> int:
        """Train it, or go on with it; the exit code of the training."""
        layout = Layout(Path(self.folder))
        saved = _last_saved(layout)
        code, asked = self._train(layout)
        # A job that is being cancelled, or put back by Slurm itself, is no longer called running.
        if code == EXIT_INTERRUPTED and _state() == "RUNNING":
            if signal.SIGUSR1 in asked and _last_saved(layout) == saved:
                _append(layout.slurm_log, NOT_ENOUGH_TIME)
            else:
                _requeue(layout)
        return code

    def _train(self, layout: Layout) -> tuple[int, set[int]]:
        """The exit code, and the signals that asked the training to stop."""
        asked: set[int] = set()
        child: subprocess.Popen | None = None

        def hand_on(number: int, frame: FrameType | None) -> None:
            asked.add(number)
            if child is not None:
                child.send_signal(number)

        for number in STOP_SIGNALS:
            signal.signal(number, hand_on)
        layout.path.mkdir(parents=True, exist_ok=True)
        cpus = int(os.environ.get("SLURM_CPUS_ON_NODE", "1"))
        threads = {"OMP_NUM_THREADS": str(max(1, cpus // self.processes))}
        resume = ["--resume"] if layout.begun else []
        with layout.slurm_log.open("ab") as log:
            child = subprocess.Popen(
                [*self.command, *resume],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=threads | os.environ,
            )
            for number in list(asked):  # which came while it was started
                child.send_signal(number)
            code = child.wait()
        return code if code >= 0 else 128 - code, asked


def text_of(tasks: Sequence[SlurmTask]) -> str:
    """What `main` reads."""
    return json.dumps([asdict(task) for task in tasks], indent=1) + "\n"


def main(file: Path) -> int:
    place = int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
    return SlurmTask(**json.loads(file.read_text(encoding="utf-8"))[place]).work()


def _last_saved(layout: Layout) -> int | None:
    with suppress(OSError):
        return layout.last.stat().st_mtime_ns
    return None


def _state() -> str:
    """What Slurm calls this job."""
    return _slurm("squeue", "--noheader", "--format=%T", "--jobs", os.environ["SLURM_JOB_ID"]).stdout.strip()


def _requeue(layout: Layout) -> None:
    answer = _slurm("scontrol", "requeue", os.environ["SLURM_JOB_ID"])
    if answer.returncode:
        _append(layout.slurm_log, NOT_REQUEUED + " ".join(answer.stderr.split()))


def _slurm(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True)


def _append(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
