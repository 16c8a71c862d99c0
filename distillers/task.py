"""What the engine trains: a module that turns a batch into losses and their named parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller
from distillers.label_loss import LabelLoss
from models.staged import StagedModel

_STORED_ELSEWHERE = ("student.", "teacher.")


class TaskOutput(NamedTuple):
    """One loss of a training step, and what is worth knowing about it.

    Attributes:
        loss: the scalar to differentiate.
        parts: named scalars for the log, detached, means over the batch: ``"loss/..."``, ``"gate/..."``; of balanced
            spots ``"weight/..."`` and ``"ratio/..."``, too.
        logits: the trained network's logits ``[B, num_classes]``, detached; None where there is nothing to score.
        gates: where each sample was distilled, ``[B, K + 1]``; None where nothing is.
        label: the classes ``[B]`` that the logits are scored by; None: those of the batch.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    logits: Tensor | None = None
    gates: Tensor | None = None
    label: Tensor | None = None


class Task(nn.Module):
    """Base class: calling it with a `Batch` yields the losses of one training step. It must not wait for the device.

    Differentiate each loss before asking for the next: a loss is computed when it is asked for, so that what the one
    before it remembers for its backward pass is gone by then. No two losses have a parameter in common::

        for output in task(batch):
            output.loss.backward()

    The network being trained is the submodule ``student``; a frozen ``teacher`` may stand beside it.

    Attributes:
        gate_labels: names of the columns of `TaskOutput.gates`.
    """

    student: StagedModel
    gate_labels: Sequence[str] = ()

    def train(self, mode: bool = True) -> Task:
        """The teacher stays in evaluation mode whatever `mode` is."""
        super().train(mode)
        for name, network in self.named_children():
            if name == "teacher":
                network.eval()
        return self

    def set_modes(self) -> None:
        """Put student and teacher into the modes that `train` gives them, whatever the user or a module around did."""
        if self.student.training != self.training or self.teacher.training:
            self.train(self.training)

    def networks(self) -> list[StagedModel]:
        """Student and teacher, or the student alone."""
        return [network for name, network in self.named_children() if name in ("student", "teacher")]

    def extra_state(self) -> dict[str, Tensor]:
        """What a checkpoint needs besides the network's own weights: policy, adapters, the distiller's modules."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith(_STORED_ELSEWHERE)}

    def load_extra_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `extra_state` gave; refuses anything missing, unknown or of another shape with a ValueError."""
        there, here = _shapes(state), _shapes(self.extra_state())
        for key in there | here:
            if there.get(key) != here.get(key):
                found, wanted = (shapes.get(key, "missing") for shapes in (there, here))
                raise ValueError(
                    f"{key} is {found}, here {wanted}: of another distiller or policy, or "
                    "of features that are cut elsewhere (kd.student.stages names a cut)"
                )
        self.load_state_dict(state, strict=False)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """What each optimiser trains; the keys are those of `utils.training.optim.make_optimizers`."""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Prepare for the epoch with index `epoch`, counted from 0: what changes in the course of the training depends
        on the epoch alone, and is written in place, where a captured step reads it."""

    def forward(self, batch: Batch) -> Iterator[TaskOutput]:
        raise NotImplementedError


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


class Classification(Task):
    """Plain training with cross-entropy: teachers, and students on their own.

    Args:
        student: the network to train.
        label_loss: cross-entropy and what comes with it; by default that alone.
    """

    def __init__(self, student: StagedModel, label_loss: LabelLoss | None = None):
        super().__init__()
        self.student = student
        self.label_loss = label_loss or LabelLoss()

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"model": list(self.student.parameters())}

    def forward(self, batch: Batch) -> Iterator[TaskOutput]:
        batch, targets = self.label_loss.mix(batch)
        logits = self.student(batch.image)
        loss = self.label_loss(logits, targets)
        yield TaskOutput(loss, {"loss/total": loss.detach()}, logits.detach(), label=targets.dominant)


class Pretraining(Task):
    """Minimises `Distiller.pretraining_loss` over `Distiller.pretraining_parameters`, and nothing else.

    Args:
        student, teacher: the networks; the teacher is frozen and stays in evaluation mode.
        distiller: one whose `pretraining_parameters` is not empty.
    """

    def __init__(self, student: StagedModel, teacher: StagedModel, distiller: Distiller):
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.distiller = distiller
        self.trained = distiller.pretraining_parameters(student)
        of_student = {id(parameter) for parameter in student.parameters()}
        self.runs_student = any(id(parameter) in of_student for parameter in self.trained)

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        return {"pretrain": self.trained}

    def forward(self, batch: Batch) -> Iterator[TaskOutput]:
        self.set_modes()
        batch = Batch(*batch)  # loaders of users may give lists
        with torch.no_grad():
            teacher_features, _ = self.teacher.features(batch.image)
        features = self.student.features(batch.image)[0] if self.runs_student else []
        loss = self.distiller.pretraining_loss(features, teacher_features)
        yield TaskOutput(loss, {"loss/total": loss.detach()})
