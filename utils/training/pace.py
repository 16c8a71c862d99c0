"""How long a step takes, told by the first ones."""

from __future__ import annotations

import time

import torch

WARM_UP, TIMED = 5, 10  # steps; a step may be recorded as a CUDA graph in the first ones


class Pace:
    """Times a few steps by the clock of the device. No step waits for it: on a GPU, the answer comes when it is there.

    Args:
        device: where the steps are computed.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._steps = 0
        self._marks: list[torch.cuda.Event | float] = []

    def seconds(self) -> float | None:
        """To be called after every step. The time of a step, once, as soon as it is known; None otherwise."""
        self._steps += 1
        if self._steps in (WARM_UP, WARM_UP + TIMED):
            self._marks.append(self._mark())
        if len(self._marks) < 2:
            return None
        first, last = self._marks
        if isinstance(first, float):
            seconds = last - first
        elif last.query():
            seconds = first.elapsed_time(last) / 1000
        else:
            return None
        self._marks = []
        return seconds / TIMED

    def _mark(self) -> torch.cuda.Event | float:
        if self._device.type != "cuda":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
