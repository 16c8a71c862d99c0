"""Seconds and bytes of training steps."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

from utils.benchmark.cases import PLAIN_KD, Case, Conditions, Kind, Pair
from utils.errors import UserError

log = logging.getLogger("sakd")

# Steps that are timed together. A GPU works through its queue meanwhile: waiting for it after each would be timed too.
STEPS = {"cpu": 2, "cuda": 60}
WARM_UP = 3  # the first makes momentum buffers and lets libraries choose kernels; on a GPU the second is captured


@dataclass(frozen=True)
class Result:
    """One kind of steps on one pair.

    Attributes:
        pair: ``"vgg13-vgg8"``.
        kind: ``"at adaptive 1/4"``; a share of 1 is not named.
        captured: the steps were one CUDA graph.
        seconds: median of a training step.
        bytes: see `peak_memory`.
        time_ratio: to plain KD's step, measured in turn with this one.
        memory_ratio: to plain KD's step.
    """

    pair: str
    kind: str
    captured: bool
    seconds: float
    bytes: int
    time_ratio: float
    memory_ratio: float


def measure_pair(pair: Pair, kinds: Sequence[Kind], conditions: Conditions) -> Iterator[Result]:
    """Plain KD, then each of `kinds`; those that refuse the pair are left out with one line.

    Besides plain KD, in turn with which the others are measured, only one case exists at a time.
    """
    device = conditions.device
    # Libraries keep some memory for good at the first step. The next case must not be charged for it.
    warm_up(Case(pair, PLAIN_KD, conditions))
    plain = unit = None
    for kind in dict.fromkeys([PLAIN_KD, *kinds]):
        before = held_memory(device)
        try:
            case = Case(pair, kind, conditions)
        except UserError as refusal:
            log.info("left out: %s, %s", kind, refusal)
            continue
        warm_up(case)
        plain = plain or case
        steps = [case.step] if case is plain else [plain.step, case.step]
        plain_time, *others = seconds(steps, conditions.rounds, STEPS[device.type])
        own_time = others[0] if others else plain_time
        peak = peak_memory(case, device, before)
        unit = unit or peak
        yield Result(str(pair), str(kind), case.captured, own_time, peak, own_time / plain_time, peak / unit)
        del case, steps


def warm_up(case: Case) -> None:
    for _ in range(WARM_UP):
        case.step()


def seconds(steps: Sequence[Callable[[], Any]], rounds: int, number: int) -> list[float]:
    """Median time of each of `steps`, measured in turn, so that other work of the machine affects all alike.

    Args:
        steps: functions without arguments.
        rounds: times that each is measured.
        number: calls that are timed together; the device is waited for before and after them.
    """
    timers = [Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads()) for step in steps]
    times = [[timer.timeit(number).mean for timer in timers] for _ in range(rounds)]
    return [median(own) for own in zip(*times)]


def held_memory(device: torch.device) -> int:
    """Bytes of all tensors on a GPU, and all that its CUDA graphs keep for themselves; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gc.collect()
    shared_pool = (0, 0)
    segments = torch.cuda.memory_snapshot()
    return sum(s["allocated_size" if s["segment_pool_id"] == shared_pool else "total_size"] for s in segments)


def peak_memory(case: Case, device: torch.device, before: int) -> int:
    """Bytes that a training step needs at the worst moment: weights, momentum, banks, activations, gradients.

    On a GPU this includes the memory of a captured step's graph and of libraries that ask PyTorch for it. On a CPU it
    is the tensors alone: what the convolution library keeps for itself is not seen.

    Args:
        case: has taken its first steps.
        device: where it is.
        before: `held_memory` before the case was made.
    """
    if device.type == "cuda":
        held = held_memory(device) - torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.step()
        torch.cuda.synchronize(device)
        return held + torch.cuda.max_memory_allocated(device) - before
    for scheduled in case.optimizers.values():
        scheduled.optimizer.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        case.step()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":  # an allocation, or, with negative bytes, the end of one
            now += event.nbytes()
            peak = max(peak, now)
    return peak + lasting_bytes(case)


def lasting_bytes(case: Case) -> int:
    """Bytes of the tensors that exist between two steps."""
    tensors = [*case.task.parameters(), *case.task.buffers(), *case.batch]
    for scheduled in case.optimizers.values():
        for state in scheduled.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
