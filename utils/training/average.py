"""The average of the weights that a network had in the last steps of its training."""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.staged import StagedModel, copied


class WeightAverage:
    """Exponential moving average (EMA) of a network's parameters and running statistics.

    Polyak, Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992, in the form of `torch.optim`'s
    ``swa_utils``. Its class ``AveragedModel`` asks at every step for a number on the device, which a step that is
    captured as a CUDA graph must not.

    Args:
        network: what is trained, on its device; its tensors must stay the same ones.
        decay: what is left of the average after a step; it reaches back about ``1 / (1 - decay)`` steps.

    Attributes:
        network: has the average weights, and is in evaluation mode. It begins with the present weights.
    """

    def __init__(self, network: StagedModel, decay: float):
        self.network = copied(network).requires_grad_(False).eval()
        pairs = list(zip(_tensors(self.network), _tensors(network), strict=True))
        # Floating-point tensors are averaged, counters are copied.
        self._numbers = [list(column) for column in zip(*(pair for pair in pairs if pair[0].is_floating_point()))]
        self._counters = [list(column) for column in zip(*(pair for pair in pairs if not pair[0].is_floating_point()))]
        self._average = get_ema_multi_avg_fn(decay)

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights of the step that has just been taken into account."""
        self._average(*self._numbers, None)
        if self._counters:
            torch._foreach_copy_(*self._counters)


def _tensors(network: nn.Module) -> chain[torch.Tensor]:
    return chain(network.parameters(), network.buffers())
