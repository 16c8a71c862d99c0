"""The training step: computed eagerly, or captured once and repeated from then on."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from datasets.batch import Batch
from distillers.task import Task, TaskOutput
from utils.errors import exhausted_memory, reason
from utils.processes.group import Replica
from utils.training.average import WeightAverage
from utils.training.cuda_graph import CudaRecorder
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter, top_k_hits
from utils.training.optim import ScheduledOptimizer
from utils.training.snapshot import PARAMETERS, Holder, Snapshot

TOLERANCE = 1e-3  # difference of a repetition from an eager step, as a share of what the step changes


@dataclass
class Phase:
    """A stretch of training with its own task and optimisers.

    Attributes:
        name: ``"train"`` for the one that is evaluated, otherwise what a distiller does before it.
        task: gives the losses.
        epochs: their number.
        optimizers: by name of parameter group.
        average: of the student's weights over the steps; None if there is none.
    """

    name: str
    task: Task
    epochs: int
    optimizers: dict[str, ScheduledOptimizer]
    average: WeightAverage | None = None


class EagerStep:
    """Forward, backward, optimisers, and counting what happened.

    Args:
        phase: what to train; its task is in training mode.
        meter: adds up the losses and the accuracy.
        gates: counts the gates.
        autocast: the context of the forward pass.
    """

    captured = False

    def __init__(self, phase: Phase, meter: Meter, gates: GateRecorder, autocast: AbstractContextManager):
        self.task, self.meter, self.gates = phase.task, meter, gates
        self.optimizers, self.average = phase.optimizers, phase.average
        trained = [parameter for item in phase.optimizers.values() for parameter in item.group["params"]]
        self._replica = Replica(phase.task, trained)
        self._autocast = autocast

    def __call__(self, batch: Batch) -> None:
        self.compute(batch)
        self.meter.tally(len(batch.label))

    def compute(self, batch: Batch) -> None:
        """All that the device does. What has to last until the next step is written in place."""
        self.drop_gradients()
        parts, logits, label, gates = {}, None, None, None
        # Backward passes stay in this thread, where a recorder decides on the memory that is allocated.
        with torch.autograd.grad_mode.set_multithreading_enabled(False):
            for output in self._losses(batch):
                output.loss.backward()
                self._replica.send_gradients()  # they travel while the next loss is computed
                parts |= output.parts
                if logits is None:
                    logits, label = output.logits, output.label
                gates = output.gates if gates is None else gates
        self._replica.receive_gradients()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self._replica.end_step()
        if self.average is not None:
            self.average.update()
        hits = {} if logits is None else top_k_hits(logits, batch.label if label is None else label)
        accuracies = {name: 100 * hit.float().mean() for name, hit in hits.items()}
        self.meter.accumulate(parts | accuracies, len(batch.label))
        if gates is not None:
            self.gates.add(gates, batch)

    def _losses(self, batch: Batch) -> Iterator[TaskOutput]:
        """The losses of the task, each computed under autocast when it is asked for, and handed over outside of it."""
        losses = self.task(batch)
        while True:
            with self._autocast:
                output = next(losses, None)
            if output is None:
                return
            yield output

    def drop_gradients(self) -> None:
        """Free the gradients of the step before."""
        for optimizer in self.optimizers.values():
            optimizer.optimizer.zero_grad(set_to_none=True)

    def holders(self) -> Iterator[Holder]:
        """The holders of everything that one step leaves to the next."""
        networks = {"": self.task} | ({"the average of ": self.average.network} if self.average is not None else {})
        for what, network in networks.items():
            for name, module in network.named_modules():
                yield f"{what}{name or 'the task'}", vars(module)
                yield f"{what}{PARAMETERS}", module._parameters
                yield f"{what}{name or 'the task'}", module._buffers
        for name, optimizer in self.optimizers.items():
            for state in optimizer.optimizer.state.values():
                yield f"the optimiser of {name}", state
        yield "the meter", vars(self.meter)
        yield "the counts of gates", vars(self.gates)


class CapturedStep:
    """A step that is captured when a batch of a new shape comes, and repeated for others like it.

    The very first step is eager, because momentum and the meter's sums are made in it. A capture has to prove itself:
    it is kept if a repetition does what an eager step did. Both kinds work on the same tensors, so nothing but the
    speed depends on which kind a step is.

    Args:
        step: what to capture.
        recorder: captures it.
        give_up: called with the number of images and the reason if steps on batches of a shape cannot be captured, and
            are eager from then on; with None for the number if that is true of all steps.

    Attributes:
        captured: steps on batches of some shape are repeated.
    """

    def __init__(self, step: EagerStep, recorder: CudaRecorder, give_up: Callable[[int | None, str], None]):
        self.captured = False
        self._step, self._give_up = step, give_up
        self._recorder: CudaRecorder | None = recorder
        self._is_first = True
        self._by_shapes: dict[Hashable, Callable[[Batch], None]] = {}  # what takes a step on batches of these shapes
        if kinds := [type(item.optimizer).__name__ for item in step.optimizers.values() if not item.capturable]:
            line = (
                f"{kinds[0]} takes its learning rate from the host, and a captured step would keep that of its capture"
            )
            self._stop_capturing(line)

    def __call__(self, batch: Batch) -> None:
        shapes = _shapes(batch)
        if self._is_first or self._recorder is None:
            self._step.compute(batch)
        elif shapes in self._by_shapes:
            self._by_shapes[shapes](batch)
        else:
            self._compute_and_capture(batch)
        self._is_first = False
        self._step.meter.tally(len(batch.label))

    def _compute_and_capture(self, batch: Batch) -> None:
        """Take the step eagerly, and capture it for further batches of these shapes."""
        torch.cuda.empty_cache()  # other steps may have freed memory that the captures can use
        before, fits = self._snapshot(), False
        try:
            self._compute_beside(batch)
            fits = True
        except RuntimeError as error:  # cuDNN has other words for exhausted memory than PyTorch
            if not exhausted_memory(error):
                raise
        if not fits:  # what the step has allocated is free by now
            self._step.drop_gradients()
            before.restore()
            self._stop_capturing("out of memory")
            self._step.compute(batch)
            return
        after = self._snapshot()
        try:
            problem = self._capture(batch, before, after)
        except Exception as error:  # the step itself is right, as it has just been taken
            problem = reason(error)
        finally:
            after.restore()
        if problem and self.captured:
            self._by_shapes[_shapes(batch)] = self._compute_beside
            self._give_up(len(batch.label), problem)
        elif problem:
            self._stop_capturing(problem)

    def _capture(self, batch: Batch, before: Snapshot, after: Snapshot) -> str:
        """Capture the step that led from `before` to `after`, and repeat it to see whether it leads there again.

        Returns:
            why the capture is not kept; empty if it is.
        """
        static = Batch(*(value.clone() for value in batch))
        before.restore()
        repeat = self._recorder.record(lambda: self._step.compute(static))
        if problem := after.find_obstacle():
            return problem
        before.restore()
        repeat()
        far = {name: found for name, found in after.distances(before).items() if not found <= TOLERANCE}
        if far:
            spread = self._spread(static, repeat, before, after)
            far = {name: found for name, found in far.items() if not found <= 2 * spread[name]}
        if far:
            return f"a repetition leaves other values in {next(iter(far))}"

        def copy_and_repeat(batch: Batch) -> None:
            for captured, value in zip(static, batch):
                captured.copy_(value)
            repeat()

        self._by_shapes[_shapes(batch)], self.captured = copy_and_repeat, True
        return ""

    def _spread(self, batch: Batch, repeat: Callable[[], None], before: Snapshot, after: Snapshot) -> dict[str, float]:
        """How far two eager steps are from each other, or two repetitions, whichever is less.

        Kernels that add in no fixed order round differently each time. A capture that went wrong is as far from the
        eager step each time.
        """
        repeated = self._snapshot()
        before.restore()
        repeat()
        of_repetitions = repeated.distances(before)
        before.restore()
        self._compute_beside(batch)
        of_steps = after.distances(before)
        return {name: min(of_steps[name], of_repetitions[name]) for name in of_steps}

    def _snapshot(self) -> Snapshot:
        return Snapshot(self._step.holders(), self._step.meter.device)

    def _compute_beside(self, batch: Batch) -> None:
        """Take an eager step in the memory of the captures, which is free between steps."""
        self._step.drop_gradients()  # they may be in other memory
        self._recorder.run(lambda: self._step.compute(batch))

    def _stop_capturing(self, problem: str) -> None:
        recorder, self._recorder = self._recorder, None
        self._by_shapes.clear()
        self.captured = False
        self._step.drop_gradients()  # they are in the recorder's memory
        recorder.release()
        self._give_up(None, problem)


def _shapes(batch: Batch) -> Hashable:
    return tuple(value.shape for value in batch)
