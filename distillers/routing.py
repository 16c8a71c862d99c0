"""Multi-path routing: one network made of both, through which the policy learns from the label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillers.base import Shape, Spot
from models.adapter import make_adapter
from models.frozen import InputGradientsOnly
from models.staged import StagedModel


class Router(nn.Module):
    """Runs teacher and student side by side and lets samples change sides at every spot (Song et al., TIP 2022).

    Holds the adapters, which are trained with the policy and belong to nobody else.

    Args:
        spots: where the two networks are joined.
        student, teacher: shape of every feature of the two networks, batch dimension left out.
    """

    def __init__(self, spots: Sequence[Spot], student: Sequence[Shape], teacher: Sequence[Shape]):
        super().__init__()
        self.spots = list(spots)
        self.to_teacher = nn.ModuleList(make_adapter(student[s], teacher[t]) for s, t in self.spots)
        self.to_student = nn.ModuleList(make_adapter(teacher[t], student[s]) for s, t in self.spots)

    def forward(
        self,
        image: Tensor,
        student: StagedModel,
        teacher: StagedModel,
        teacher_features: Sequence[Tensor],
        teacher_logits: Tensor,
        gates: Tensor,
    ) -> Tensor:
        """Routed logits ``[B, num_classes]``.

        Args:
            student, teacher: both frozen and in evaluation mode.
            teacher_features, teacher_logits: what the teacher gave for `image`; its first segment is not run again.
            gates: ``[B, K + 1]``; 1 sends a sample through the teacher.
        """
        first_stop = self.spots[0].student + 1 if self.spots else None
        with torch.no_grad():  # nothing that is trained here comes before the first spot
            u_s = student.run(image, stop=first_stop)
        u_t = teacher_features[self.spots[0].teacher] if self.spots else teacher_logits
        for k, spot in enumerate(self.spots):
            last = k + 1 == len(self.spots)
            stop_s, stop_t = (None, None) if last else (self.spots[k + 1].student + 1, self.spots[k + 1].teacher + 1)
            into_teacher = mix(self.to_teacher[k](u_s), u_t, gates[:, k])
            into_student = mix(u_s, self.to_student[k](u_t), gates[:, k])
            with InputGradientsOnly():
                u_s = student.run(into_student, spot.student + 1, stop_s)
                u_t = teacher.run(into_teacher, spot.teacher + 1, stop_t)
        return mix(u_s, u_t, gates[:, -1])


def mix(student_route: Tensor, teacher_route: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * student_route + gate * teacher_route`` per sample, exact where the gate is 0 or 1.

    Args:
        student_route, teacher_route: ``[B, ...]``, of one shape.
        gate: ``[B]``.
    """
    gate = gate.view(-1, *[1] * (student_route.dim() - 1)).to(student_route.dtype)
    return torch.lerp(student_route, teacher_route.to(student_route.dtype), gate)
