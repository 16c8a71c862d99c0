"""How far a grid is and how long it will take."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from tqdm import tqdm

from distillers import DISTILLERS
from utils.grid.plan import Job
from utils.grid.pool import Pool
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_epochs

EVERY = 5.0  # seconds between two looks at the runs' records


class Progress:
    """A line at the bottom of a terminal, and a line per event above it, which is all where output goes to a file."""

    def __init__(self, total: int):
        self.total = total
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stdout.isatty(), file=sys.stdout, leave=False)
        self._looked = -EVERY

    def say(self, text: str) -> None:
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
        sys.stdout.flush()
        self._looked = -EVERY

    def __call__(self, pool: Pool) -> None:
        if self._bar.disable or time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        self._bar.set_description_str(self.text(pool))

    def close(self) -> None:
        """Take the line off the terminal."""
        self._bar.close()

    def text(self, pool: Pool) -> str:
        """``[7/40] 2 running | left 1:02:03``."""
        seconds = seconds_left([item.job for item in pool.running], pool.waiting, len(pool.slots))
        left = "not known yet" if seconds is None else tqdm.format_interval(seconds)
        return f"[{len(pool.outcomes)}/{self.total}] {len(pool.running)} running | left {left}"


def seconds_left(running: Sequence[Job], waiting: Sequence[Job], slots: int) -> float | None:
    """Epochs to go at the pace of a job's own epochs, else of those of its kind, else of all; None without any."""
    paces: dict[object, list[float]] = defaultdict(list)
    todo: list[tuple[Job, int]] = []
    for job in [*running, *waiting]:
        seconds = [epoch["seconds"] for epoch in read_epochs(Layout(job.folder).metrics)]
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


def _keys(job: Job) -> tuple:
    config = job.config
    kind = (config.kd.teacher.title, config.kd.student.title, config.kd_loss.name) if config.kd else config.model.title
    return job.folder, kind, "any"
