"""Optimisers and their learning rates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from utils.config import Config

# What belongs to the device rather than to the training: the tensor of the learning rate, and the kind of kernels.
_OF_THE_DEVICE = ("lr", "foreach", "fused")


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
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(self.lr_at(epoch))  # a CUDA graph reads this very tensor
            else:
                group["lr"] = self.lr_at(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's own, with the learning rate as a plain number: the same on every device."""
        state = self.optimizer.state_dict()
        for group in state["param_groups"]:
            group["lr"] = float(group["lr"])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on whatever device; how this device computes stays as it is."""
        own = [{key: group[key] for key in _OF_THE_DEVICE} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state)
        for group, kept in zip(self.optimizer.param_groups, own):
            group.update(kept)
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                # Fused kernels take it for granted that all is laid out in memory as the parameter is.
                kept[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


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
    how = _on_gpu(lr, parameters[0].device) if parameters[0].is_cuda else {"lr": lr}
    return torch.optim.SGD(parameters, **how, momentum=momentum, weight_decay=weight_decay)


def _on_gpu(lr: float, device: torch.device) -> dict[str, Any]:
    """One kernel for all parameters; a learning rate on the device can change under a graph, a number could not."""
    return {"lr": torch.tensor(lr, dtype=torch.float32, device=device), "fused": True}
