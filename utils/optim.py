"""Optimisers and their learning rates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from utils.config import Config


@dataclass
class ScheduledOptimizer:
    """SGD whose learning rate depends on the epoch alone, so that there is no schedule to save or restore.

    Attributes:
        optimizer: the optimiser.
        lr: learning rate at the start.
        decay_epochs: numbers of finished epochs after which the rate is multiplied by `decay_rate`, increasing.
        decay_rate: the factor.
    """

    optimizer: torch.optim.SGD
    lr: float
    decay_epochs: Sequence[int] = ()
    decay_rate: float = 0.1

    def lr_at(self, epoch: int) -> float:
        """Learning rate in the epoch with index `epoch`, counted from 0."""
        return self.lr * self.decay_rate ** bisect_right(self.decay_epochs, epoch)

    def start_epoch(self, epoch: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr_at(epoch)


def make_optimizers(groups: dict[str, list[nn.Parameter]], config: Config) -> dict[str, ScheduledOptimizer]:
    """One optimiser per group of `Task.parameter_groups`, with the hyper-parameters that the config gives it.

    ``model``: a network trained alone. ``student``: the student and what the distiller trains. ``agent``: the
    policy and the adapters. ``pretrain``: a distiller's own phase, at a constant rate.
    """
    return {name: _make_optimizer(name, parameters, config) for name, parameters in groups.items()}


def _make_optimizer(name: str, parameters: list[nn.Parameter], config: Config) -> ScheduledOptimizer:
    training = config.training
    if name == "pretrain":
        pretrain = config.pretrain.optimizer
        return ScheduledOptimizer(_sgd(parameters, pretrain.lr, pretrain.momentum, pretrain.weight_decay), pretrain.lr)
    lr, decay_epochs, weight_decay = {
        "model": (training.lr, training.lr_decay_epochs, training.optimizer.weight_decay),
        "student": (training.lr, training.lr_decay_epochs, training.optimizer.weight_decay_stage2),
        "agent": (training.lr_agent, training.lr_agent_decay_epochs, training.optimizer.weight_decay_agent),
    }[name]
    optimizer = _sgd(parameters, lr, training.optimizer.momentum, weight_decay)
    return ScheduledOptimizer(optimizer, lr, decay_epochs, training.lr_decay_rate)


def _sgd(parameters: list[nn.Parameter], lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
