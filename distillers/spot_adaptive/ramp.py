"""Weights that grow over the first epochs."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ramp(nn.Module):
    """Multiplies a loss by ``(epoch + 1) / epochs`` in the first `epochs` epochs, and leaves it alone from then on.

    The factor is a tensor that is filled in place: a CUDA graph reads this very tensor. It follows from the epoch, so
    no checkpoint has it. Before the first `start_epoch` it is 1.

    Args:
        epochs: 0 for no ramp at all; the loss then passes unchanged.
    """

    factor: Tensor

    def __init__(self, epochs: int):
        super().__init__()
        self.epochs = epochs
        if epochs:
            self.register_buffer("factor", torch.ones(()), persistent=False)

    def start_epoch(self, epoch: int) -> None:
        if self.epochs:
            self.factor.fill_(min(1.0, (epoch + 1) / self.epochs))

    def forward(self, loss: Tensor) -> Tensor:
        return loss * self.factor if self.epochs else loss
