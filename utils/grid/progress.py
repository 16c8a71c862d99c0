"""How far a grid is and how long it will take."""

from __future__ import annotations

import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from tqdm import tqdm

from distillers import DISTILLERS
from utils.grid.plan import Job
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_epochs

EVERY = 5.0  # seconds between two looks at the runs' records
EVERY_IN_FILE = 300.0  # the same where output goes to a file, which gets a line each time
NAMED = 3  # running jobs whose epoch is shown


class Queue(Protocol):
    """What works through the jobs: `utils.grid.pool.Pool` here, `utils.grid.slurm.SlurmQueue` on a cluster.

    Attributes:
        jobs: all of them.
        running: those whose processes run.
        outcomes: of those that have ended, by their folders.
        slots: as many as run at a time.
    """

    jobs: list[Job]
    running: list[Job]
    outcomes: dict[Path, Any]
    slots: list[Any]


class Progress:
    """A line at the bottom of a terminal, and a line per event above it; in a file, such a line every few minutes."""

    def __init__(self) -> None:
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stdout.isatty(), file=sys.stdout, leave=False)
        self._looked = time.monotonic()

    def say(self, text: str) -> None:
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
        sys.stdout.flush()

    def __call__(self, queue: Queue) -> None:
        if time.monotonic() - self._looked < (EVERY_IN_FILE if self._bar.disable else EVERY):
            return
        self._looked = time.monotonic()
        if self._bar.disable:
            self.say(progress_line(queue))
        else:
            # A line that is wider than the terminal would not be overwritten but pile up.
            self._bar.set_description_str(progress_line(queue)[: shutil.get_terminal_size().columns - 1])

    def close(self) -> None:
        """Take the line off the terminal."""
        self._bar.close()


def progress_line(queue: Queue) -> str:
    """``[7/40] left 1:02:03 | at fixed, resnet20-resnet8, seed 1029: epoch 3/12``, of the first few running jobs."""
    running = queue.running
    seconds = seconds_left(queue.jobs, queue.outcomes, len(queue.slots))
    left = "not known before the first epoch" if seconds is None else tqdm.format_interval(seconds)
    named = [
        f"{job.name}: epoch {min(len(_seconds(job.folder)) + 1, epochs_of(job))}/{epochs_of(job)}"
        for job in running[:NAMED]
    ]
    more = [f"{len(running) - NAMED} more"] * (len(running) > NAMED)
    return " | ".join([f"[{len(queue.outcomes)}/{len(queue.jobs)}] left {left}", *named, *more])


def seconds_left(jobs: Sequence[Job], ended: dict[Path, Any], slots: int) -> float | None:
    """Time for the epochs to go, at the pace of a job's own epochs, else of those of its kind, else of all.

    Args:
        jobs: all of them.
        ended: has the folders of those that have ended, whose pace counts as well.
        slots: how many run at a time.

    Returns:
        None if no epoch of any of them is known.
    """
    paces: dict[object, list[float]] = defaultdict(list)
    for job in jobs:
        if seconds := _seconds(job.folder):
            for key in _keys(job):
                paces[key].append(fmean(seconds))
    total = 0.0
    for job in jobs:
        epochs = 0 if job.folder in ended else max(epochs_of(job) - len(_seconds(job.folder)), 0)
        if epochs and not paces:
            return None
        total += epochs and epochs * next(fmean(paces[key]) for key in _keys(job) if key in paces)
    return total / slots


def epochs_of(job: Job) -> int:
    """Epochs that it will record, those of its distiller's own phase among them."""
    config = job.config
    pretrains = config.kd and DISTILLERS.get(config.kd_loss.name).has_pretraining()
    return config.training.epochs + (config.pretrain.epochs if pretrains else 0)


def _keys(job: Job) -> tuple:
    """The job itself, its kind, and all."""
    config = job.config
    kind = (config.kd.teacher.title, config.kd.student.title, config.kd_loss.name) if config.kd else config.model.title
    return job.folder, kind, "any"


def _seconds(folder: Path) -> tuple[float, ...]:
    """The time of each finished epoch of a run."""
    metrics = Layout(folder).metrics
    try:
        return _read_seconds(metrics, metrics.stat().st_mtime_ns)
    except OSError:  # it has not begun, or its folder cannot be entered
        return ()


@cache
def _read_seconds(metrics: Path, changed: int) -> tuple[float, ...]:
    """The same as long as the file does not change: a grid looks at hundreds of them again and again."""
    return tuple(epoch["seconds"] for epoch in read_epochs(metrics))
