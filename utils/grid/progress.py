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
from utils.grid.pool import Outcome
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_epochs

EVERY = 5.0  # seconds between two looks at the runs' records
EVERY_IN_FILE = 300.0  # the same where output goes to a file, which gets a line each time
NAMED = 3  # running jobs whose epoch is shown


class Queue(Protocol):
    """What works through the jobs: `utils.grid.pool.Pool` here, `utils.grid.slurm.SlurmQueue` on a cluster.

    Attributes:
        jobs: all of them.
        waiting: those that have not begun.
        running: things with an attribute `job`.
        slots: as many as run at a time.
        outcomes: of the jobs that are through, by their folders.
    """

    jobs: list[Job]
    waiting: list[Job]
    running: list[Any]
    slots: list[Any]
    outcomes: dict[Path, Outcome]

    def work(self) -> list[Outcome]:
        """Go through all jobs; how they went."""


class Progress:
    """A line at the bottom of a terminal, and a line per event above it; in a file, such a line every few minutes."""

    def __init__(self, total: int):
        self.total = total
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stdout.isatty(), file=sys.stdout, leave=False)
        self._looked = -EVERY
        self._written = time.monotonic()

    def say(self, text: str) -> None:
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
        sys.stdout.flush()
        self._looked = -EVERY

    def __call__(self, pool: Queue) -> None:
        now = time.monotonic()
        if self._bar.disable:
            if now - self._written >= EVERY_IN_FILE:
                self._written = now
                self.say(self.text(pool))
        elif now - self._looked >= EVERY:
            self._looked = now
            # A line that is wider than the terminal would not be overwritten but pile up.
            self._bar.set_description_str(self.text(pool)[: shutil.get_terminal_size().columns - 1])

    def close(self) -> None:
        """Take the line off the terminal."""
        self._bar.close()

    def text(self, pool: Queue) -> str:
        """``[7/40] left 1:02:03 | at fixed, resnet20-resnet8, seed 1029: epoch 3/12``."""
        running = [item.job for item in pool.running]
        through = [job for job in pool.jobs if job.folder in pool.outcomes]
        seconds = seconds_left(running, pool.waiting, len(pool.slots), through)
        left = "not known before the first epoch" if seconds is None else tqdm.format_interval(seconds)
        return " | ".join([f"[{len(pool.outcomes)}/{self.total}] left {left}", *current_epochs(running)])


def current_epochs(running: Sequence[Job]) -> list[str]:
    """``"at fixed, resnet20-resnet8, seed 1029: epoch 3/12"`` of the first few, and how many more there are."""
    named = []
    for job in running[:NAMED]:
        epochs = epochs_of(job)
        named.append(f"{job.name}: epoch {min(len(_seconds(job.folder)) + 1, epochs)}/{epochs}")
    return named + [f"{len(running) - NAMED} more"] * (len(running) > NAMED)


def seconds_left(
    running: Sequence[Job], waiting: Sequence[Job], slots: int, through: Sequence[Job] = ()
) -> float | None:
    """Epochs to go at the pace of a job's own epochs, else of those of its kind, else of all; None without any.

    Args:
        through: jobs that are done, whose pace counts as well.
    """
    paces: dict[object, list[float]] = defaultdict(list)
    todo: list[tuple[Job, int]] = []
    for job in through:
        for key in _keys(job) if _final_seconds(job.folder) else ():
            paces[key].append(fmean(_final_seconds(job.folder)))
    for job in [*running, *waiting]:
        seconds = _seconds(job.folder)
        todo.append((job, max(epochs_of(job) - len(seconds), 0)))
        for key in _keys(job) if seconds else ():
            paces[key].append(fmean(seconds))
    total = 0.0
    for job, epochs in todo:
        pace = next((fmean(paces[key]) for key in _keys(job) if key in paces), None)
        if pace is None and epochs:
            return None
        total += epochs * (pace or 0.0)
    return total / slots


def epochs_of(job: Job) -> int:
    """Epochs that it will record, those of its distiller's own phase among them."""
    config = job.config
    pretrains = config.kd and DISTILLERS.get(config.kd_loss.name).has_pretraining()
    return config.training.epochs + (config.pretrain.epochs if pretrains else 0)


def _seconds(folder: Path) -> list[float]:
    """What each finished epoch of a run took."""
    return [epoch["seconds"] for epoch in read_epochs(Layout(folder).metrics)]


_final_seconds = cache(_seconds)  # of a run that is through, whose file is not read again and again


def _keys(job: Job) -> tuple:
    config = job.config
    kind = (config.kd.teacher.title, config.kd.student.title, config.kd_loss.name) if config.kd else config.model.title
    return job.folder, kind, "any"
