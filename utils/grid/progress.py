"""How far a grid is and how long it will take."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from utils.grid.plan import Job
from utils.grid.pool import Pool
from utils.report.collect import read_json_lines
from utils.training.reporter import clock

EVERY = 5.0  # seconds between two looks at the runs' records


class Progress:
    """A line at the bottom of the terminal; nothing where output goes to a file, which has a line per event anyway."""

    def __init__(self, total: int):
        self.total = total
        self._live = sys.stdout.isatty()
        self._looked = -EVERY
        self._pace: dict[tuple, list[float]] = defaultdict(list)

    def say(self, text: str) -> None:
        if self._live:
            print("\r\x1b[2K", end="")
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
        self._looked = -EVERY

    def __call__(self, pool: Pool) -> None:
        if not self._live or time.monotonic() - self._looked < EVERY:
            return
        self._looked = time.monotonic()
        print(f"\r\x1b[2K{self.text(pool)}", end="", flush=True)

    def text(self, pool: Pool) -> str:
        """``[7/40] 2 running | left 1:02:03``."""
        seconds = seconds_left([item.job for item in pool.running], pool.waiting, len(pool.slots))
        left = "not known yet" if seconds is None else clock(seconds)
        return f"[{len(pool.outcomes)}/{self.total}] {len(pool.running)} running | left {left}"


def seconds_left(running: Sequence[Job], waiting: Sequence[Job], slots: int) -> float | None:
    """Epochs to go at the pace of a job's own epochs, else of those of its kind, else of all; None without any."""
    paces: dict[object, list[float]] = defaultdict(list)
    todo: list[tuple[Job, int]] = []
    for job in [*running, *waiting]:
        seconds = [record["seconds"] for record in read_json_lines(job.folder / "metrics.jsonl")]
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
    """Epochs that it will record, a distiller's own phase among them."""
    config = job.config
    own = config.pretrain.epochs if config.kd and config.kd_loss.name in ("ft", "fsp") else 0
    return config.training.epochs + own


def _keys(job: Job) -> tuple:
    config = job.config
    kind = (config.kd.teacher.title, config.kd.student.title, config.kd_loss.name) if config.kd else config.model.title
    return job.folder, kind, "any"
