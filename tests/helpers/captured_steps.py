"""A task that takes steps, eagerly or captured on a tape."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from step_tape import TapeRecorder
from torch import nn
from toy_runs import toy_config
from toys import NUM_CLASSES, NUM_SAMPLES, ToyNet, toy_batch, toy_task

from datasets.batch import Batch
from distillers.task import Classification
from utils.training.build import make_label_loss, make_phases
from utils.training.device import rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.precision import autocast
from utils.training.step import CapturedStep, EagerStep

CPU = torch.device("cpu")


def use_optimizers_of_a_gpu(patch: pytest.MonkeyPatch) -> None:
    """Learning rates in tensors, and kernels that read them there: what a tape needs as much as a graph."""
    patch.setattr(nn.Parameter, "is_cuda", True, raising=False)


class Training:
    """A task with everything that a step needs; the same arguments give the same numbers.

    Args:
        distiller: of the toy task; None: a network alone.
        recorder: captures the steps; None: they are eager.
        precision: as in the config.
        training: keys of the config.
        device: where the task is.
        options: of the toy task.

    Attributes:
        complaints: what the log would say.
    """

    def __init__(
        self,
        distiller="at",
        recorder: TapeRecorder | None = None,
        precision: str = "fp32",
        training: dict[str, Any] | None = None,
        device: torch.device = CPU,
        **options: Any,
    ):
        config = toy_config(**training or {})
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(0)
        options["label_loss"] = make_label_loss(config)
        task = toy_task(distiller, **options) if distiller else Classification(ToyNet(), **options).train()
        self.task, self.device = task.to(device), device
        phase = make_phases(self.task, config)[-1]
        self.optimizers, self.average = phase.optimizers, phase.average
        self.meter = Meter(device)
        self.gates = GateRecorder(list(self.task.gate_labels), NUM_CLASSES, NUM_SAMPLES, device)
        self.complaints: list[tuple[int | None, str]] = []
        self.recorder = recorder
        step = EagerStep(phase, self.meter, self.gates, autocast(device, precision))
        self.step = CapturedStep(step, recorder, lambda *what: self.complaints.append(what)) if recorder else step
        torch.manual_seed(11)
        self._taken = 0

    def take(self, sizes: Iterable[int], within: Callable[[], AbstractContextManager] = nullcontext) -> Training:
        """A step for each batch size, in the context of `within`; no two batches are alike."""
        batches = [toy_batch(size, seed=seed) for seed, size in enumerate(sizes, self._taken)]
        batches = [Batch(*(value.to(self.device) for value in batch)) for batch in batches]
        with within():
            for batch in batches:
                self.step(batch)
                self._taken += 1
        return self

    def state(self) -> dict[str, Any]:
        """Everything that one step leaves to the next, as plain values."""
        state = {
            "task": self.task.state_dict(),
            "optimizers": {name: item.state_dict() for name, item in self.optimizers.items()},
            "meter": self.meter.state_dict(),
            "gates": self.gates.state_dict(),
            "average": self.average and self.average.network.state_dict(),
            "random": rng_state(self.device),
        }
        return copy.deepcopy(state)

    def momentum(self, name: str) -> torch.Tensor:
        optimizer = self.optimizers[name].optimizer
        return optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]
