"""The training step: computed eagerly, or captured once and repeated from then on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.task import Task, TaskOutput
from utils.errors import reason
from utils.processes.group import Replica
from utils.training.device import rng_state, set_rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter, top_k_hits
from utils.training.optim import ScheduledOptimizer


@dataclass
class Phase:
    """A stretch of training with its own task and optimisers.

    Attributes:
        name: ``"train"`` for the one that is evaluated, otherwise what a distiller does before it.
        task: gives the loss.
        epochs: how many.
        optimizers: by name of parameter group.
    """

    name: str
    task: Task
    epochs: int
    optimizers: dict[str, ScheduledOptimizer]

    def parameters(self) -> Iterator[nn.Parameter]:
        """All that is trained."""
        for scheduled in self.optimizers.values():
            for group in scheduled.optimizer.param_groups:
                yield from group["params"]


class Recorder(Protocol):
    """What can capture a step, see `utils.training.cuda_graph.CudaRecorder`."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` as often as it takes, and return what repeats it."""


class EagerStep:
    """Forward, backward, optimisers, and counting what happened.

    Args:
        phase: what to train; its task is in training mode.
        meter: adds up the losses and the accuracy.
        gates: counts the gates.
        autocast: makes the context of the forward pass.
    """

    captured = False

    def __init__(self, phase: Phase, meter: Meter, gates: GateRecorder, autocast: Callable[[], AbstractContextManager]):
        self.task, self.meter, self.gates = phase.task, meter, gates
        self.optimizers = [scheduled.optimizer for scheduled in phase.optimizers.values()]
        self._replica = Replica(phase.task, phase.parameters())
        self._autocast = autocast

    def __call__(self, batch: Batch) -> None:
        self.compute(batch)
        self.meter.tally(len(batch.label))

    def compute(self, batch: Batch) -> None:
        """All that the device does. What has to last until the next step is written in place."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        parts, logits, gates = {}, None, None
        for output in self._losses(batch):
            output.loss.backward()
            self._replica.send_gradients()  # they travel while the next loss is computed
            parts |= output.parts
            logits = output.logits if logits is None else logits
            gates = output.gates if gates is None else gates
        self._replica.receive_gradients()
        for optimizer in self.optimizers:
            optimizer.step()
        self._replica.end_step()
        hits = {} if logits is None else top_k_hits(logits, batch.label)
        self.meter.accumulate(parts | hits, len(batch.label))
        if gates is not None:
            self.gates.add(gates, batch)

    def _losses(self, batch: Batch) -> Iterator[TaskOutput]:
        """The losses of the task, each computed under autocast when it is asked for, and handed over outside of it."""
        losses = self.task(batch)
        while True:
            with self._autocast():
                output = next(losses, None)
            if output is None:
                return
            yield output

    def memory(self) -> Iterator[dict[str, Any]]:
        """Where everything is that one step leaves to the next: attributes by name, which may be put back."""
        for module in self.task.modules():
            yield from (vars(module), module._parameters, module._buffers)
        for optimizer in self.optimizers:
            yield from optimizer.state.values()
        yield from (vars(self.meter), vars(self.gates))


class CapturedStep:
    """A step that is captured when a batch of some shape comes for the second time, and repeated for that shape.

    The first time is eager because much is made on first use: momentum, the meter's sums. Batches of other shapes,
    such as the smaller one at the end of an epoch, stay eager. Both kinds work on the same tensors, so nothing but
    the speed depends on which kind a step is.

    Args:
        step: what to capture.
        recorder: captures it.
        give_up: told why, if it cannot be captured; from then on all steps are eager.
    """

    def __init__(self, step: EagerStep, recorder: Recorder, give_up: Callable[[str], None]):
        self._step = step
        self._untried: tuple[Recorder, Callable[[str], None]] | None = (recorder, give_up)
        self._seen: set[tuple[torch.Size, ...]] = set()
        self._batch: Batch | None = None  # where the captured step reads
        self._repeat: Callable[[], None] | None = None

    @property
    def captured(self) -> bool:
        """Steps on batches of some shape are repeated."""
        return self._repeat is not None

    def __call__(self, batch: Batch) -> None:
        if self._untried is not None and shapes(batch) in self._seen:
            self._capture(batch)
        self._seen.add(shapes(batch))
        if self._repeat is None or shapes(batch) != shapes(self._batch):
            self._step.compute(batch)
        else:
            for place, value in zip(self._batch, batch):
                place.copy_(value)
            self._repeat()
        self._step.meter.tally(len(batch.label))

    def _capture(self, batch: Batch) -> None:
        """Capture the step, or give up; either way, everything is as it was before."""
        # Gone after this, also because `give_up` is usually a method of who holds this step: no circle, no garbage.
        (recorder, give_up), self._untried = self._untried, None
        static = Batch(*(value.clone() for value in batch))
        before, problem = Snapshot(self._step.memory(), self._step.meter.device), ""
        try:
            repeat = recorder.record(lambda: self._step.compute(static))
            problem = before.find_replaced()
        except Exception as error:  # whatever is wrong with the step itself, eager steps will run into as well
            problem = reason(error)
        finally:
            before.restore()
        if problem:
            give_up(problem)
        else:
            self._batch, self._repeat = static, repeat


def make_step(
    phase: Phase,
    meter: Meter,
    gates: GateRecorder,
    autocast: Callable[[], AbstractContextManager],
    recorder: Recorder | None,
    give_up: Callable[[str], None],
) -> EagerStep | CapturedStep:
    """The step of a phase; captured if there is a `recorder`. See both classes for the arguments."""
    step = EagerStep(phase, meter, gates, autocast)
    return step if recorder is None else CapturedStep(step, recorder, give_up)


def shapes(batch: Batch) -> tuple[torch.Size, ...]:
    """Of the batch's tensors."""
    return tuple(value.shape for value in batch)


class Snapshot:
    """Tensors and numbers as they are now, and the random state.

    Tensors are put back in place, because others hold the same ones: the student's frozen twin, and a captured step.

    Args:
        places: dictionaries whose tensors and numbers are meant.
        device: whose random state is meant, besides the CPU's.
    """

    def __init__(self, places: Iterable[dict[str, Any]], device: torch.device):
        self._device = device
        self._places = [(place, remembered(place)) for place in places]
        self._copies = [
            (value, value.detach().clone())
            for _, values in self._places
            for value in values.values()
            if isinstance(value, Tensor)
        ]
        self._random = rng_state(device)

    def find_replaced(self) -> str:
        """What is wrong with capturing the steps taken since, if something is.

        A captured step would go on reading the tensor that was there when it was captured, and never count on.
        """
        for place, values in self._places:
            now = remembered(place)
            for name in values | now:
                if name not in values or name not in now or not same(values[name], now[name]):
                    return f"{name} is replaced at every step, and only what is written in place can be captured"
        return ""

    @torch.no_grad()
    def restore(self) -> None:
        for place, values in self._places:
            place.update(values)
        for value, copy in self._copies:
            value.copy_(copy)
        set_rng_state(self._random, self._device)


def remembered(place: dict[str, Any]) -> dict[str, Any]:
    """The entries that one step can leave to the next."""
    return {name: value for name, value in place.items() if isinstance(value, Tensor | int | float)}


def same(first: Any, second: Any) -> bool:
    """The same tensor, or equal numbers."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    return first == second
