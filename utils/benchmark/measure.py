"""Seconds and bytes of training steps."""

from __future__ import annotations

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

WARM_UP = 2  # steps: the first one makes momentum buffers, and libraries choose and compile their kernels


def seconds(steps: Sequence[Callable[[], Any]], rounds: int, device: torch.device) -> list[float]:
    """Median time of each of `steps`."""
    return [median(laps) for laps in lap_times(steps, rounds, device)]


def lap_times(
    steps: Sequence[Callable[[], Any]], rounds: int, device: torch.device, title: str | None = None
) -> list[list[float]]:
    """`rounds` times of each of `steps`, measured in turn, so that what else the machine does hits all alike.

    With a `title` the rounds are shown on a progress bar.
    """
    times: list[list[float]] = [[] for _ in steps]
    for _ in tqdm(range(rounds), desc=title, leave=False, disable=title is None):
        for step, own in zip(steps, times):
            own.append(timed(step, device))
    return times


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


def peak_memory(case: Case, device: torch.device) -> int:
    """Bytes of all tensors of a training step at the worst moment: weights, momentum, banks, activations, gradients.

    What the convolution library keeps for itself on a CPU is not seen.
    """
    for scheduled in case.optimizers.values():
        scheduled.optimizer.zero_grad(set_to_none=True)
    peak = _peak_on_cuda if device.type == "cuda" else _peak_on_cpu
    return peak(case.step, device) + lasting_bytes(case)


def lasting_bytes(case: Case) -> int:
    """Bytes of the tensors that are there between two steps."""
    tensors = [*case.task.parameters(), *case.task.buffers(), *case.batch]
    for scheduled in case.optimizers.values():
        for state in scheduled.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _peak_on_cuda(function: Callable[[], Any], device: torch.device) -> int:
    wait_for(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    wait_for(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(function: Callable[[], Any], device: torch.device) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":  # one allocation, or, with negative bytes, the end of one
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def phase_seconds(case: Case, rounds: int, device: torch.device) -> dict[str, float]:
    """Median time of each part of a training step; the device is waited for in between, which a run does not do."""
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
