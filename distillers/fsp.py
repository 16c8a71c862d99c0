"""The flow between two layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, masked_mean, pool_to_match
from distillers.registry import register_distiller
from models.staged import StagedModel
from utils.errors import UserError


@at_least(torch.float32)
def fsp_loss(
    student_bottom: Tensor, student_top: Tensor, teacher_bottom: Tensor, teacher_top: Tensor, gate: Tensor
) -> Tensor:
    """Mean squared difference of the flow matrices of both networks.

    Yim, Joo, Bae, Kim: *A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
    Learning*, CVPR 2017 (FSP: flow of the solution procedure).

    Args:
        student_bottom, teacher_bottom: the earlier maps, ``[B, C, H, W]``, of one width.
        student_top, teacher_top: the later maps, ``[B, D, H', W']``, of one width.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    student = flattened(student_bottom, student_top)
    teacher = flattened(teacher_bottom, teacher_top)
    (channels, positions), width = student[0].shape[1:], student[1].shape[1]
    # Multiplications of the two ways to the same number, over 2 * positions. On a core of a CPU, batch 64, forward and
    # backward, the second takes 1/12 of the time at 512 and 1024 channels of 4x4, the same at 256 and 512 of 8x8.
    by_positions, by_channels = 2 * positions * (channels + width), channels * width
    if by_positions < by_channels and positions == teacher[0].shape[2]:
        squares = difference_by_positions(*student, *teacher)
    else:
        squares = (flow_matrix(*student) - flow_matrix(*teacher)).square().sum(dim=(1, 2))
    return masked_mean(squares / (channels * width), gate)


def flattened(bottom: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps at the size of the smaller, ``[B, C, P]`` and ``[B, D, P]``."""
    bottom, top = pool_to_match(bottom, top)
    return bottom.flatten(2), top.flatten(2)


def flow_matrix(bottom: Tensor, top: Tensor) -> Tensor:
    """``[B, C, D]``: mean product, over positions, of every channel of `bottom` with every channel of `top`."""
    return bottom / bottom.shape[2] @ top.mT  # dividing the product would copy what is by far the largest tensor


def difference_by_positions(
    student_bottom: Tensor, student_top: Tensor, teacher_bottom: Tensor, teacher_top: Tensor
) -> Tensor:
    """Squared norms ``[B]`` of the differences of both flow matrices, from products of positions alone.

    With ``P = [student bottom, teacher bottom]`` and ``Q = [student top, -teacher top]``, joined along the positions,
    the difference is ``P Qᵀ`` and its squared norm the inner product of ``Pᵀ P`` and ``Qᵀ Q``. That is the square of
    what may be a small difference of large terms, hence float64.
    """
    bottom = torch.cat([student_bottom, teacher_bottom], dim=2).double() / student_bottom.shape[2]
    top = torch.cat([student_top, -teacher_top], dim=2).double()
    return ((bottom.mT @ bottom) * (top.mT @ top)).sum(dim=(1, 2)).to(student_top.dtype)


@register_distiller("fsp")
class FSP(Distiller):
    """Flow into each middle feature from the one before it, in networks of equal widths.

    The paper's two phases: the student's stages learn the flows alone, then the usual training follows.

    Raises:
        UserError: a spot has no feature before it, or the widths of the two networks differ there.
    """

    default_weight = 50.0
    maps_only = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        for s, t in self.spots:
            if s == 0 or t == 0:
                raise UserError(f"kd_loss.spots {[s, t]}: fsp needs a feature before the spot; spots start at 1")
            student, teacher = (
                f"{shapes[k - 1][0]}→{shapes[k][0]}" for shapes, k in ((setting.student, s), (setting.teacher, t))
            )
            if student != teacher:
                raise UserError(
                    f"fsp: {setting.pair}, spot {[s, t]}: student {student} channels, teacher {teacher}; FSP compares "
                    "channel by channel, pick a pair with equal widths or another distiller"
                )

    def forward(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor], gates: Tensor, batch: Batch | None
    ) -> Tensor:
        losses = [
            fsp_loss(student[s - 1], student[s], teacher[t - 1].detach(), teacher[t].detach(), gates[:, k])
            for k, (s, t) in enumerate(self.spots)
        ]
        return torch.stack(losses)

    def pretraining_parameters(self, student: StagedModel) -> list[nn.Parameter]:
        """The parameters of the student's stages up to the last spot."""
        return student.parameters_until(self.spots[-1].student + 1)

    def pretraining_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Losses of all spots and all samples, summed over the spots."""
        everything = torch.ones(len(student[0]), len(self.spots), device=student[0].device)
        return self(student, teacher, everything, None).sum()
