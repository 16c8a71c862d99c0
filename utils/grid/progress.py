"""How far a grid is and how long it will take."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from distillers import DISTILLERS
from utils.grid.plan import Job
from utils.grid.pool import Outcome
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_epochs

EVERY = 5.0  # seconds between two looks at the runs' records
EVERY_IN_FILE = 300.0  # the same where output goes to a file, which gets a line each time
NAMED = 3  # running jobs whose epoch is shown


class Progress:
    """A line at the bottom of a terminal, and a line per event above it; in a file, such a line every few minutes.

    Args:
        jobs: all of them.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._bar = tqdm(bar_format="{desc}", disable=not sys.stdout.isatty(), file=sys.stdout, leave=False)
        self._started = self._looked = time.monotonic()
        self._all = {job.folder: epochs_of(job) for job in jobs}
        self._done = {job.folder: epochs_done(job) for job in jobs}
        self._before = sum(self._done.values())

    def say(self, text: str) -> None:
        tqdm.write(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stdout)
        sys.stdout.flush()

    def __call__(self, running: Sequence[Job], outcomes: Mapping[Path, Outcome]) -> None:
        """To be called often, with the running jobs and the outcomes of those that have ended, by their folders."""
        if time.monotonic() - self._looked < (EVERY_IN_FILE if self._bar.disable else EVERY):
            return
        self._looked = time.monotonic()
        if self._bar.disable:
            self.say(self.line(running, outcomes))
        else:
            # A line that is wider than the terminal would not be overwritten but pile up.
            self._bar.set_description_str(self.line(running, outcomes)[: shutil.get_terminal_size().columns - 1])

    def close(self) -> None:
        """Take the line off the terminal."""
        self._bar.close()

    def line(self, running: Sequence[Job], outcomes: Mapping[Path, Outcome]) -> str:
        """``[7/40] left 1:02:03 | at fixed, resnet20-resnet8, seed 1029: epoch 3/12``, of the first few running jobs.

        The time left is that of the epochs to go, at the rate of the epochs since the start.
        """
        finished = [folder for folder, outcome in outcomes.items() if outcome.status == "finished"]
        self._done |= {folder: self._all[folder] for folder in finished}
        self._done |= {job.folder: epochs_done(job) for job in running}
        done = sum(self._done.values())
        left = "not known before the first epoch"
        if done > self._before:
            seconds = (time.monotonic() - self._started) / (done - self._before)
            to_do = sum(self._all[folder] - self._done[folder] for folder in self._all if folder not in outcomes)
            left = tqdm.format_interval(seconds * to_do)
        named = [
            f"{job.name}: epoch {min(self._done[job.folder] + 1, self._all[job.folder])}/{self._all[job.folder]}"
            for job in running[:NAMED]
        ]
        more = [f"{len(running) - NAMED} more"] * (len(running) > NAMED)
        return " | ".join([f"[{len(outcomes)}/{len(self._all)}] left {left}", *named, *more])


def epochs_of(job: Job) -> int:
    """Epochs that it will record, those of its distiller's own phase among them."""
    config = job.config
    pretrains = config.kd and DISTILLERS.get(config.kd_loss.name).has_pretraining()
    return config.training.epochs + (config.pretrain.epochs if pretrains else 0)


def epochs_done(job: Job) -> int:
    """Epochs that it has recorded."""
    return min(len(read_epochs(Layout(job.folder).metrics)), epochs_of(job))
