"""Seconds and bytes of training steps."""

from __future__ import annotations

import gc
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from utils.benchmark.cases import Case


def seconds(
    steps: Sequence[Callable[[], Any]], rounds: int, device: torch.device, title: str | None = None
) -> list[float]:
    """Median time of each of `steps`, measured in turn, so that what else the machine does affects all alike.

    With a `title` the rounds are shown on a progress bar.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in tqdm(range(rounds), desc=title, leave=False, disable=title is None):
        for step, own in zip(steps, times):
            own.append(timed(step, device))
    return [median(own) for own in times]


def timed(function: Callable[[], Any], device: torch.device) -> float:
    """Seconds that a call takes until the device is done with it."""
    wait_for(device)
    start = time.perf_counter()
    function()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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

    On a GPU the memory of a captured step's graph is included, and what libraries ask PyTorch for; on a CPU it is the
    tensors alone, since what the convolution library keeps for itself is not seen.

    Args:
        case: has taken its first steps.
        device: where it is.
        before: `held_memory` before the case was made.
    """
    if device.type == "cuda":
        held = held_memory(device) - torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        case.step()
        wait_for(device)
        return held + torch.cuda.max_memory_allocated(device) - before
    for scheduled in case.optimizers.values():
        scheduled.optimizer.zero_grad(set_to_none=True)
    return _peak_on_cpu(case.step) + lasting_bytes(case)


def lasting_bytes(case: Case) -> int:
    """Bytes of the tensors that are there between two steps."""
    tensors = [*case.task.parameters(), *case.task.buffers(), *case.batch]
    for scheduled in case.optimizers.values():
        for state in scheduled.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _peak_on_cpu(function: Callable[[], Any]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one allocation, or, with negative bytes, the end of one
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def phase_seconds(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Median time of each part of an eager step; the device is waited for in between, which a run does not do."""
    clock = Stopwatch(device)
    clock.watch(case.task.teacher, "features", "teacher")
    clock.watch(case.task.student, "features", "student")
    if case.task.policy is not None:
        clock.watch(case.task.router, "forward", "routing")
    clock.watch(Tensor, "backward", "backward")
    for scheduled in case.optimizers.values():
        clock.watch(scheduled.optimizer, "step", "optimisers")
    clock.watch(case.eager, "compute", "step")
    laps = []
    for _ in range(rounds):
        clock.times.clear()
        case.eager(case.batch)
        laps.append(_phases(dict(clock.times)))
    clock.release()
    return {name: median(lap[name] for lap in laps) for name in laps[0]}


def _phases(lap: dict[str, float]) -> dict[str, float]:
    """The step without its parts is the ``rest``: losses, gates, and counting what happened."""
    step = lap.pop("step")
    return lap | {"rest": step - sum(lap.values())}


class Stopwatch:
    """Times of named calls, collected by wrapping the methods that a step calls.

    Attributes:
        times: seconds by name.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.times: dict[str, float] = defaultdict(float)
        self._watched: list[tuple[object, str, Any]] = []

    def watch(self, owner: object, method: str, name: str) -> None:
        """From now on, count the time of ``owner.method()`` as `name`; the owner may be a module of functions."""
        original, own = getattr(owner, method), vars(owner).get(method)

        def watched(*args: Any, **kwargs: Any) -> Any:
            wait_for(self.device)
            start = time.perf_counter()
            result = original(*args, **kwargs)
            wait_for(self.device)
            self.times[name] += time.perf_counter() - start
            return result

        setattr(owner, method, watched)
        self._watched.append((owner, method, own))

    def release(self) -> None:
        """Give the methods back."""
        for owner, method, own in self._watched:
            delattr(owner, method) if own is None else setattr(owner, method, own)
        self._watched.clear()
