"""The measurements of one pair, and of the loaders."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from utils.benchmark.cases import PLAIN_KD, Case, Conditions, Kind, Pair
from utils.benchmark.loaders import endless, memory_loader, per_image
from utils.benchmark.measure import held_memory, peak_memory, phase_seconds, seconds
from utils.benchmark.published import PublishedSteps
from utils.errors import UserError

log = logging.getLogger("sakd")

# Steps: the first makes momentum buffers and lets libraries choose their kernels; on a GPU the second is captured.
WARM_UP = {"cpu": 2, "cuda": 3}
LOADER_ROUNDS = 50


@dataclass
class Result:
    """One kind of steps on one pair.

    Attributes:
        pair, distiller, selection, share: what was measured; see `Kind`.
        captured: the steps were one CUDA graph.
        seconds: median of a training step.
        bytes: see `peak_memory`.
        time_ratio: to plain KD's step, measured in turn with this one.
        memory_ratio: to plain KD's step.
        phases: share of each part of an eager step, in the order in which they follow one another; empty if captured.
        published_seconds: median of a step of the published code, measured in turn with this one.
    """

    pair: str
    distiller: str
    selection: str
    share: str
    captured: bool
    seconds: float
    bytes: int
    time_ratio: float
    memory_ratio: float
    phases: dict[str, float] = field(default_factory=dict)
    published_seconds: float | None = None


@dataclass(frozen=True)
class LoaderResult:
    """The in-memory loader against torchvision's transforms of one image at a time.

    Attributes:
        memory, per_image: images per second on one core of the CPU.
        batch_seconds: median time of a batch of the in-memory loader on the device of the steps.
    """

    memory: float
    per_image: float
    batch_seconds: float


def measure_pair(
    pair: Pair, kinds: Sequence[Kind], conditions: Conditions, data_seconds: float, published: Path | None = None
) -> Iterator[Result]:
    """Plain KD, then each of `kinds`; those that refuse the pair are left out.

    Besides plain KD, in turn with which the others are measured, only one case is there at a time.

    Args:
        pair: the networks.
        kinds: what to measure.
        conditions: of the measurement.
        data_seconds: time that the loader takes for a batch.
        published: a checkout of the published code, whose adaptive steps are measured in turn with ours.
    """
    device = conditions.device
    plain = unit = None
    # What libraries keep for good is not counted for the next case.
    warm_up(Case(pair, PLAIN_KD, conditions).step, device)
    for kind in dict.fromkeys([PLAIN_KD, *kinds]):
        before = held_memory(device)
        try:
            case = Case(pair, kind, conditions)
        except UserError as refusal:
            log.info("left out: %s, %s", kind, refusal)
            continue
        plain = plain or case
        with ExitStack() as stack:
            steps = [plain.step, case.step]
            if published and kind.selection == "adaptive" and kind.share == 1:
                steps += _published_step(stack, published, pair, kind, conditions)
            for step in steps if case is plain else steps[1:]:
                warm_up(step, device)
            plain_time, own_time, *rest = seconds(steps, conditions.rounds, device, title=f"{pair} {kind}")
        peak = peak_memory(case, device, before)
        phases = {}
        if not case.captured:
            phases = {"data": data_seconds} | phase_seconds(case, max(1, conditions.rounds // 2), device)
        unit = unit or peak
        yield Result(
            pair=str(pair),
            distiller=kind.distiller,
            selection=kind.selection,
            share=str(kind.share),
            captured=case.captured,
            seconds=own_time,
            bytes=peak,
            time_ratio=1.0 if case is plain else own_time / plain_time,
            memory_ratio=peak / unit,
            phases={name: value / sum(phases.values()) for name, value in phases.items()},
            published_seconds=rest[0] if rest else None,
        )
        del case, steps, step


def warm_up(step: Callable[[], None], device: torch.device) -> None:
    for _ in range(WARM_UP[device.type]):
        step()


def _published_step(stack: ExitStack, folder: Path, pair: Pair, kind: Kind, conditions: Conditions) -> list:
    """The step of the published code, if it can take one; it is closed by `stack`."""
    try:
        return [stack.enter_context(PublishedSteps(folder, pair, kind.distiller, conditions)).step]
    except UserError as refusal:
        log.info("published code left out: %s, %s", kind, refusal)
        return []


def measure_loaders(conditions: Conditions) -> LoaderResult:
    """Both on one core of the CPU, and the in-memory one on the device of the steps."""
    device, on_cpu = conditions.device, replace(conditions, device=torch.device("cpu"))
    batches, one_by_one = endless(memory_loader(on_cpu)), per_image(on_cpu)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ours, theirs = seconds([lambda: next(batches), one_by_one], LOADER_ROUNDS, on_cpu.device)
    finally:
        torch.set_num_threads(threads)
    batches = endless(memory_loader(conditions))
    (batch,) = seconds([lambda: next(batches)], LOADER_ROUNDS, device)
    return LoaderResult(on_cpu.batch_size / ours, on_cpu.batch_size / theirs, batch)
