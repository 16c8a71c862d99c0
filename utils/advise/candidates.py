"""Ways to train a student, what they cost, and how many of them fit into some hours."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from math import ceil

import pandas as pd
import torch
from tqdm import tqdm

from datasets import Data
from datasets.source import Source
from distillers import DISTILLERS
from utils.config import Config
from utils.config.find import BALANCE
from utils.errors import UserError
from utils.run_folder.read import SINGLE
from utils.training.accuracy import evaluate
from utils.training.build import build, load_data, make_phases
from utils.training.dry_run import step_seconds
from utils.training.precision import autocast, place_task

LEAST_SHARE = 4  # with less time, fewer candidates are trained, not shorter than a quarter of the epochs
MOST_SEEDS = 5
START = 10.0  # seconds until a process trains


@dataclass(frozen=True)
class Candidate:
    """A way to train a student.

    Attributes:
        student: its name.
        selection: `SINGLE` for the student alone.
        distiller: without a meaning for the student alone.
        sweep: a ``key=value`` word, or none.
    """

    student: str
    selection: str = SINGLE
    distiller: str = "kd"
    sweep: tuple[str, ...] = ()

    def __str__(self) -> str:
        how = "alone" if self.selection == SINGLE else f"{self.distiller}, {self.selection}"
        return ", ".join([f"{self.student} {how}", *self.sweep])


def make_candidates(
    students: Sequence[str], distillers: Sequence[str], selections: Sequence[str], balance: float | None = None
) -> tuple[Candidate, ...]:
    """All of them, the more important ones first: students alone, the first selection, balanced, other selections.

    Only distillers with spots can be balanced, by `balance` or the usual limit. Other selections are balanced where
    that is the default.
    """
    first, *others = selections
    with_spots = [name for name in distillers if not DISTILLERS.get(name).logits_only]
    ways = [(first, name, ("kd.balance=null",) if name in with_spots else ()) for name in distillers]
    ways += [(first, name, (f"kd.balance={balance or BALANCE}",)) for name in with_spots]
    ways += [(selection, name, ()) for selection in others for name in distillers]
    return (*map(Candidate, students), *(Candidate(student, *way) for way, student in product(ways, students)))


@dataclass(frozen=True)
class Duration:
    """Seconds that a run takes.

    Attributes:
        step: one training step.
        start: before the first epoch, the distiller's own phase included.
        epoch: validation included.
    """

    step: float
    start: float
    epoch: float

    def of(self, epochs: int) -> float:
        return self.start + epochs * self.epoch


def measure(
    configs: Mapping[Candidate, Config], source: Source, device: torch.device
) -> tuple[dict[Candidate, Duration], dict[Candidate, UserError]]:
    """Time a few steps of each candidate, with random weights of the teacher; and why others cannot be trained."""
    durations, refused, validations = {}, {}, {}
    first = next(iter(configs.values()))
    started = time.monotonic()
    with closing(load_data(source, first, device)) as data:
        start = START + time.monotonic() - started
        with tqdm(configs.items(), desc="timing a few steps", leave=False, disable=None) as items:
            for candidate, config in items:
                try:
                    durations[candidate] = _duration(config, source, data, device, start, validations)
                except UserError as error:
                    refused[candidate] = error
                gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the runs need it
    return durations, refused


def _duration(
    config: Config, source: Source, data: Data, device: torch.device, start: float, validations: dict[str, float]
) -> Duration:
    """How long a run takes; the time of a validation is that of `validations` if the student has been timed before."""
    task, _ = build(config, source, device)
    phases = make_phases(place_task(task, config, device, source.image_size), config)
    *before, step = [step_seconds(phase, data, config, device) for phase in phases]
    steps = len(data.train)
    start += sum(seconds * steps * phase.epochs for seconds, phase in zip(before, phases))
    if config.student.title not in validations:
        started = time.monotonic()
        evaluate(task.student, data.val, device, autocast(device, config.training.precision))
        validations[config.student.title] = time.monotonic() - started
    return Duration(step, start, steps * step + validations[config.student.title])


@dataclass(frozen=True)
class Choice:
    """What is going to be trained: each of the candidates with each of the seeds."""

    candidates: tuple[Candidate, ...]
    seeds: tuple[int, ...]
    epochs: int

    def __str__(self) -> str:
        seeds, count = " ".join(map(str, self.seeds)), len(self.candidates) * len(self.seeds)
        return f"{len(self.candidates)} candidates, seeds {seeds}, {self.epochs} epochs: {count} runs"

    def table(self, durations: Mapping[Candidate, Duration]) -> pd.DataFrame:
        """The time of a step and a run of each candidate, as text."""
        rows = [
            (str(one), f"{1000 * durations[one].step:.1f}", tqdm.format_interval(durations[one].of(self.epochs)))
            for one in self.candidates
        ]
        return pd.DataFrame(rows, columns=["candidate", "ms a step", "a run takes"])

    def seconds(self, durations: Mapping[Candidate, Duration]) -> float:
        return len(self.seeds) * sum(durations[candidate].of(self.epochs) for candidate in self.candidates)


def fit(durations: Mapping[Candidate, Duration], choice: Choice, seconds: float, *, more_seeds: bool = False) -> Choice:
    """As much of `choice` as takes no longer than `seconds`.

    First the epochs become fewer, down to a quarter, then the last candidates are left out, then seeds. A student alone
    and one that is distilled remain. With `more_seeds`, seeds are added where there is time for them, up to five.

    Raises:
        UserError: even the least takes longer.
    """

    def fits(candidates: Sequence[Candidate], seeds: Sequence[int], epochs: int) -> bool:
        return Choice(tuple(candidates), tuple(seeds), epochs).seconds(durations) <= seconds

    kept, seeds, least = list(choice.candidates), list(choice.seeds), ceil(choice.epochs / LEAST_SHARE)
    needed = sum(candidate.selection == SINGLE for candidate in kept) + 1
    while len(kept) > needed and not fits(kept, seeds, least):
        kept.pop()
    while len(seeds) > 1 and not fits(kept, seeds, least):
        seeds.pop()
    if not fits(kept, seeds, least):
        whole = Choice(tuple(kept), tuple(seeds), least).seconds(durations)
        raise UserError(
            f"--hours: {seconds / 3600:.2g} hours are left, but {kept[-1]} and what it is compared with take "
            f"{whole / 3600:.2g} hours for {least} epochs; a smaller training.epochs, or fewer students"
        )
    epochs = max(epochs for epochs in range(least, choice.epochs + 1) if fits(kept, seeds, epochs))
    while more_seeds and len(seeds) < MOST_SEEDS and fits(kept, [*seeds, seeds[-1] + 1], choice.epochs):
        seeds.append(seeds[-1] + 1)
    return Choice(tuple(kept), tuple(seeds), epochs)
