"""The phase in which a distiller trains something of its own before it distils (FT, FSP)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from datasets.batch import Batch
from distillers.base import Distiller
from distillers.task import Task, TaskOutput
from models.staged import StagedModel


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
        with torch.no_grad():
            teacher_features, _ = self.teacher.features(batch.image)
        features = self.student.features(batch.image)[0] if self.runs_student else []
        loss = self.distiller.pretraining_loss(features, teacher_features)
        yield TaskOutput(loss, {"loss/total": loss.detach()})
