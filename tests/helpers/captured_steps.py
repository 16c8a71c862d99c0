"""A task that takes steps, eagerly or captured on a tape, and what goes wrong with the latter."""

from __future__ import annotations

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
from distillers.at import AT
from distillers.task import Classification
from utils.training.build import make_label_loss, make_phases
from utils.training.device import rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.precision import autocast
from utils.training.step import make_step

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
        if isinstance(recorder, Off | RoundsDifferently):
            recorder.training = self
        self.step = make_step(
            phase,
            self.meter,
            self.gates,
            lambda: autocast(device, precision),
            recorder,
            lambda size, why: self.complaints.append((size, why)),
        )
        torch.manual_seed(11)
        self._taken = 0

    def take(self, sizes: Iterable[int], within: Callable[[], AbstractContextManager] = nullcontext) -> Training:
        """A step for each batch size, in the context of `within`; no two batches are alike."""
        batches = [toy_batch(size, seed=seed) for seed, size in enumerate(sizes, self._taken)]
        batches = [Batch(*(value.to(self.device) for value in batch)) for batch in batches]
        with within():
            for batch in batches:
                self.task.start_step(self._taken)
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
            "average": self.average and self.average.state_dict(),
            "random": rng_state(self.device),
        }
        return _copied(state)

    def momentum(self, name: str) -> torch.Tensor:
        optimizer = self.optimizers[name].optimizer
        return optimizer.state[optimizer.param_groups[0]["params"][0]]["momentum_buffer"]


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_copied(item) for item in value]
    return value.clone() if isinstance(value, torch.Tensor) else value


# ---- recorders


class Failing(TapeRecorder):
    """Rehearses like the others and fails then."""

    def record(self, function):
        super().record(function)
        raise RuntimeError(
            "CUDA error: operation not permitted\nwhen stream is capturing\n"
            "Search for `cudaErrorStreamCaptureUnsupported' in https://docs.nvidia.com for more information.\n"
        )


class Full(TapeRecorder):
    """The GPU's memory is full when a step is computed beside the captures, of which there are `captures` by then."""

    def __init__(self, captures: int):
        super().__init__()
        self.captures, self.released = captures, False

    def run(self, function):
        super().run(function)
        if self.recorded >= self.captures:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def release(self):
        self.released = True


class FullInTheSecondCapture(TapeRecorder):
    """There is memory for eager steps, not for another capture."""

    def record(self, function):
        if self.recorded == 1:
            self.recorded += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().record(function)


class RoundsDifferently(TapeRecorder):
    """The weights differ a little after each step, as kernels that add in no fixed order let them.

    Args:
        share: by which part of themselves, once more and once less.
        steps: eager steps do so too.
    """

    def __init__(self, share: float, *, steps: bool = True):
        super().__init__()
        self.share, self.steps, self.training, self._count = share, steps, None, 0

    def run(self, function):
        super().run(function)
        if self.steps:
            self._round()

    def record(self, function):
        repeat = super().record(function)

        def repeat_and_round():
            repeat()
            self._round()

        return repeat_and_round

    @torch.no_grad()
    def _round(self):
        self._count += 1
        self.training.task.student.conv1.weight.mul_(1 + self.share * (-1) ** self._count)


class Off(TapeRecorder):
    """Its repetitions are followed by `error`, called with the training."""

    def __init__(self, error: Callable[[Training], Any]):
        super().__init__()
        self.error, self.training = error, None

    def record(self, function):
        repeat = super().record(function)

        def repeat_and_err():
            repeat()
            with torch.no_grad():
                self.error(self.training)

        return repeat_and_err


# ---- distillers that would go wrong if captured


class Altered(AT):
    """Its losses are multiplied by `factor`."""

    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * self.factor(student, gate, batch)

    def factor(self, student, gate, batch):
        raise NotImplementedError


class Waits(Altered):
    def factor(self, student, gate, batch):
        return 1 if gate.sum().item() else 0


class Breaks(Altered):
    """At the second batch."""

    def factor(self, student, gate, batch):
        if batch.label[0] == toy_batch(8, seed=1).label[0]:
            raise ValueError("a mistake")
        return 1


class Replaces(Altered):
    """Keeps a running mean in a buffer, but makes a new one at every step."""

    def __init__(self, setting):
        super().__init__(setting)
        self.register_buffer("center", torch.zeros(()))

    def factor(self, student, gate, batch):
        self.center = 0.9 * self.center + 0.1 * student.detach().mean()
        return 1 + self.center


class Counts(Altered):
    """Warms up over its own steps, which Python counts."""

    def __init__(self, setting):
        super().__init__(setting)
        self.steps = 0

    def factor(self, student, gate, batch):
        self.steps += 1
        return min(1.0, self.steps / 20)


class DrawsInPython(Altered):
    def factor(self, student, gate, batch):
        return random.random()


class DrawsOnItsOwn(Altered):
    """From a generator that nobody else knows of."""

    def __init__(self, setting):
        super().__init__(setting)
        self.generator = np.random.default_rng(3)

    def factor(self, student, gate, batch):
        return float(self.generator.random())
