"""Multi-path routing: one network made of both, through which the policy learns from the label."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from distillers.base import Shape, Spot
from distillers.spot_adaptive.frozen import InputGradientsOnly
from models.adapter import make_adapter
from models.staged import StagedModel


class Router(nn.Module):
    """Runs teacher and student side by side and lets samples change sides at every spot (Song et al., TIP 2022).

    It holds the adapters. They are trained with the policy and are part of neither network.

    Args:
        spots: where the two networks are joined.
        student, teacher: shape of every feature of the two networks, batch dimension left out.
    """

    def __init__(self, spots: Sequence[Spot], student: Sequence[Shape], teacher: Sequence[Shape]):
        super().__init__()
        self.spots = list(spots)
        self.to_teacher = nn.ModuleList(make_adapter(student[s], teacher[t]) for s, t in self.spots)
        self.to_student = nn.ModuleList(make_adapter(teacher[t], student[s]) for s, t in self.spots)

    def start(self, teacher_features: Sequence[Tensor], teacher_logits: Tensor) -> Tensor:
        """The teacher's feature at the first spot, where the routed pass starts; without a spot the teacher's logits.

        The teacher's stages before it are not run again.
        """
        return teacher_features[self.spots[0].teacher] if self.spots else teacher_logits

    def forward(
        self, image: Tensor, student: StagedModel, teacher: StagedModel, start: Tensor, gates: Tensor
    ) -> Tensor:
        """Routed logits ``[B, num_classes]``.

        Args:
            student, teacher: both frozen and in evaluation mode.
            start: see `start`.
            gates: ``[B, K + 1]``; 1 sends a sample through the teacher.
        """
        with torch.no_grad():  # neither policy nor adapters come before the first spot
            u_s = student.run(image, stop=self.spots[0].student + 1 if self.spots else None)
        u_t = start
        stops = [(spot.student + 1, spot.teacher + 1) for spot in self.spots[1:]] + [(None, None)]
        for k, (spot, (stop_s, stop_t)) in enumerate(zip(self.spots, stops)):
            gate, to_student, to_teacher = gates[:, k], self.to_student[k], self.to_teacher[k]
            # The mixed maps are not kept under names, so that their memory is free once the first layer has read them.
            with InputGradientsOnly():
                routed_s = student.run(mix(u_s, to_student(u_t), gate), spot.student + 1, stop_s)
                routed_t = teacher.run(mix(to_teacher(u_s), u_t, gate), spot.teacher + 1, stop_t)
            u_s, u_t = routed_s, routed_t
        return mix(u_s, u_t, gates[:, -1])


def mix(student_route: Tensor, teacher_route: Tensor, gate: Tensor) -> Tensor:
    """``(1 - gate) * student_route + gate * teacher_route`` per sample, exact where the gate is 0 or 1.

    Args:
        student_route, teacher_route: ``[B, ...]``, of one shape.
        gate: ``[B]``.
    """
    gate = gate.view(-1, *[1] * (student_route.dim() - 1)).to(student_route.dtype)
    return torch.lerp(student_route, teacher_route.to(student_route.dtype), gate)
