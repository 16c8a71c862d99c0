"""The measurements of one pair, and of the loaders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from tqdm import tqdm

from utils.benchmark.cases import Case, Conditions, Pair, make_teacher
from utils.benchmark.loaders import endless, memory_loader, per_image
from utils.benchmark.measure import WARM_UP, lap_times, peak_memory, phase_seconds, seconds
from utils.errors import UserError

log = logging.getLogger("sakd")

BASELINE = ("kd", "fixed")  # plain knowledge distillation
SELECTIONS = ("fixed", "adaptive")
BETWEEN = 4  # cases between two steps of plain KD
LOADER_ROUNDS = 50


@dataclass
class Result:
    """One distiller under one selection, on one pair.

    Attributes:
        seconds: median of a training step.
        images_per_second: the same in images.
        bytes: largest total size of all tensors during a step.
        time_ratio, memory_ratio: to plain KD's of the same run.
        phases: share of each part of the step, in the order in which they follow one another.
    """

    pair: str
    distiller: str
    selection: str
    seconds: float
    images_per_second: float
    bytes: int
    time_ratio: float
    memory_ratio: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LoaderResult:
    """The in-memory loader against torchvision's transforms of one image at a time, both on one CPU core.

    Attributes:
        memory, per_image: images per second.
    """

    memory: float
    per_image: float

    @property
    def ratio(self) -> float:
        return self.memory / self.per_image


def measure_pair(
    pair: Pair, distillers: Sequence[str], conditions: Conditions, rounds: int, overrides: tuple[str, ...] = ()
) -> list[Result]:
    """Plain KD, then every distiller at fixed spots and spot-adaptively; those that refuse the pair are left out."""
    device = conditions.device
    cases = build_cases(pair, distillers, conditions, overrides)
    for case in tqdm(cases, desc=f"{pair} warm-up", leave=False):
        for _ in range(WARM_UP):
            case.step()
    times = step_seconds(cases, rounds, device, title=str(pair))
    peaks = [peak_memory(case, device) for case in tqdm(cases, desc=f"{pair} memory", leave=False)]
    batches = endless(memory_loader(conditions))
    (data,) = seconds([lambda: next(batches)], rounds, device)
    results = []
    for case, time, peak in tqdm(list(zip(cases, times, peaks)), desc=f"{pair} phases", leave=False):
        phases = {"data": data} | phase_seconds(case, rounds, device)
        results.append(
            Result(
                pair=str(pair),
                distiller=case.distiller,
                selection=case.selection,
                seconds=time,
                images_per_second=conditions.batch_size / time,
                bytes=peak,
                time_ratio=time / times[0],
                memory_ratio=peak / peaks[0],
                phases={name: value / sum(phases.values()) for name, value in phases.items()},
            )
        )
    return results


def step_seconds(cases: Sequence[Case], rounds: int, device: torch.device, title: str) -> list[float]:
    """Median time of a step of each case. The first one, by which all are divided, is taken again and again."""
    order = [k for start in range(1, len(cases), BETWEEN) for k in (0, *range(start, min(start + BETWEEN, len(cases))))]
    laps = lap_times([cases[k].step for k in order or [0]], rounds, device, title)
    return [median(lap for k, own in zip(order or [0], laps) if k == case for lap in own) for case in range(len(cases))]


def build_cases(
    pair: Pair, distillers: Sequence[str], conditions: Conditions, overrides: tuple[str, ...] = ()
) -> list[Case]:
    """Plain KD first; one teacher for all."""
    teacher = make_teacher(pair, conditions)
    wanted = [BASELINE, *((name, selection) for name in distillers for selection in SELECTIONS)]
    cases = []
    for distiller, selection in dict.fromkeys(wanted):
        try:
            cases.append(Case(pair, distiller, selection, teacher, conditions, overrides))
        except UserError as refusal:
            log.info("left out: %s, %s", selection, refusal)
    return cases


def measure_loaders(conditions: Conditions) -> LoaderResult:
    """Both on one core of the CPU, whatever device the networks are measured on."""
    on_cpu = replace(conditions, device=torch.device("cpu"))
    batches, one_by_one = endless(memory_loader(on_cpu)), per_image(on_cpu)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = seconds([lambda: next(batches), one_by_one], LOADER_ROUNDS, on_cpu.device)
    finally:
        torch.set_num_threads(threads)
    return LoaderResult(on_cpu.batch_size / ours, on_cpu.batch_size / theirs)
