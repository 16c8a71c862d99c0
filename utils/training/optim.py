"""Optimisers and their learning rates."""

from __future__ import annotations

import inspect
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.config import Config
from utils.config.training import OptimizerConfig, TrainingConfig
from utils.errors import doing

_FUSED = ("SGD", "Adam", "AdamW")  # have kernels for a GPU that update all parameters at once


@dataclass
class ScheduledOptimizer:
    """An optimiser whose learning rate depends on the epoch alone, so that there is no schedule to save or restore.

    Attributes:
        optimizer: the optimiser.
        lr: learning rate that the schedule refers to.
        schedule: what it is multiplied by in an epoch, counted from 0.
        clip_norm: the largest norm that all gradients together may have; 0: any.
    """

    optimizer: Optimizer
    lr: float
    schedule: Callable[[int], float] = lambda epoch: 1.0
    clip_norm: float = 0.0

    @property
    def group(self) -> dict[str, Any]:
        """The settings of the optimiser and, under ``params``, what it trains; there is one group."""
        return self.optimizer.param_groups[0]

    @property
    def capturable(self) -> bool:
        """Whether a step that is captured as a CUDA graph follows the learning rate."""
        return isinstance(self.group["lr"], Tensor)

    def lr_at(self, epoch: int) -> float:
        """Learning rate in the epoch with index `epoch`, counted from 0."""
        return self.lr * self.schedule(epoch)

    def start_epoch(self, epoch: int) -> None:
        if self.capturable:
            self.group["lr"].fill_(self.lr_at(epoch))  # a CUDA graph reads this very tensor
        else:
            self.group["lr"] = self.lr_at(epoch)

    def step(self) -> None:
        """Change the parameters by their gradients, which does not wait for the device."""
        if self.clip_norm:
            nn.utils.clip_grad_norm_(self.group["params"], self.clip_norm)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's own, with the learning rate as a plain number: the same on every device."""
        state = self.optimizer.state_dict()
        state["param_groups"][0]["lr"] = float(self.group["lr"])
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, on whatever device; the settings stay those of the config."""
        if (there := len(state["param_groups"][0]["params"])) != (here := len(self.group["params"])):
            raise ValueError(f"an optimiser trained {there} parameters, here are {here}")
        rate = self.group["lr"]
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state["state"]})
        self.group["lr"] = rate  # PyTorch has copied the tensor
        for parameter, kept in self.optimizer.state.items():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    # Fused kernels take it for granted that all is laid out in memory as the parameter is.
                    is_like = name != "step" and value.shape == parameter.shape
                    kept[name] = torch.empty_like(parameter if is_like else value, requires_grad=False).copy_(value)


def make_optimizers(groups: dict[str, list[nn.Parameter]], config: Config) -> dict[str, ScheduledOptimizer]:
    """One optimiser per group of `Task.parameter_groups`, with the hyper-parameters that the config gives it.

    ``model``: a network trained alone. ``student``: the student and what the distiller trains. ``agent``: the
    policy and the adapters, by an optimiser of the same kind. ``pretrain``: a distiller's own phase, by SGD at a
    constant rate.

    Raises:
        UserError: see `check_options`.
    """
    return {name: _make_optimizer(name, parameters, config) for name, parameters in groups.items()}


def check_options(optimizer: OptimizerConfig) -> None:
    """Take a step on one parameter: an optimiser looks at some arguments as late as that.

    Raises:
        UserError: the optimiser does not take ``training.optimizer.options``.
    """
    parameter = nn.Parameter(torch.zeros(1, 1))
    parameter.grad = torch.ones_like(parameter)
    with _trying(optimizer):
        _build(optimizer, [parameter], 0.1, 0.0).step()


def _trying(optimizer: OptimizerConfig) -> AbstractContextManager[None]:
    return doing(f"training.optimizer.options: {optimizer.name} with {optimizer.options}")


def _make_optimizer(name: str, parameters: list[nn.Parameter], config: Config) -> ScheduledOptimizer:
    training = config.training
    if name == "pretrain":
        pretrain = config.pretrain.optimizer
        sgd = OptimizerConfig(momentum=pretrain.momentum)
        return ScheduledOptimizer(_build(sgd, parameters, pretrain.lr, pretrain.weight_decay), pretrain.lr)
    lr, decay_epochs, weight_decay = {
        "model": (training.lr, training.lr_decay_epochs, training.optimizer.weight_decay),
        "student": (training.lr, training.lr_decay_epochs, training.optimizer.weight_decay_stage2),
        "agent": (training.lr_agent, training.lr_agent_decay_epochs, training.optimizer.weight_decay_agent),
    }[name]
    optimizer = _build(training.optimizer, parameters, lr, weight_decay)
    clip_norm = 0.0 if name == "agent" else training.clip_grad_norm
    return ScheduledOptimizer(optimizer, lr, partial(_factor, training, decay_epochs), clip_norm)


def _factor(training: TrainingConfig, decay_epochs: Sequence[int], epoch: int) -> float:
    """What the learning rate is multiplied by in epoch `epoch`, counted from 0.

    Loshchilov, Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017, arXiv 1608.03983 (cosine).
    """
    warmup = training.warmup_epochs
    if epoch < warmup:
        return (epoch + 1) / (warmup + 1)
    if training.schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - warmup) / (training.epochs - warmup))) / 2
    return training.lr_decay_rate ** bisect_right(decay_epochs, epoch)


def _build(optimizer: OptimizerConfig, parameters: list[nn.Parameter], lr: float, decay: float) -> Optimizer:
    kind, own = getattr(torch.optim, optimizer.name), {"lr": lr}
    known, on_gpu = inspect.signature(kind).parameters, parameters[0].is_cuda
    if "weight_decay" in known:
        own["weight_decay"] = decay
    if optimizer.name == "SGD":
        own |= {"momentum": optimizer.momentum, "nesterov": optimizer.nesterov}
    # With these a step stays on the GPU; Adagrad and Adafactor have none, and count steps on the host.
    how = {"fused": True} if on_gpu and optimizer.name in _FUSED else {}
    how |= {"capturable": True} if on_gpu and "capturable" in known else {}
    with _trying(optimizer):
        built = kind(parameters, **own, **how, **optimizer.options)
    if how:
        # A learning rate on the device can change under a graph, a number could not. The constructor is not given it,
        # because that would look at its value.
        built.param_groups[0]["lr"] = torch.tensor(lr, dtype=torch.float32, device=parameters[0].device)
    return built
