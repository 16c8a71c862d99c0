"""What a distiller is: it says *what* to distil; the gates it is handed say *where*."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models.staged import StagedModel
from utils.errors import UserError

Shape = tuple[int, ...]


class Spot(NamedTuple):
    """A place where to distil: the index of a student feature and that of a teacher feature."""

    student: int
    teacher: int


@dataclass(frozen=True)
class Setting:
    """What a distiller may know when it is built.

    Attributes:
        student, teacher: shape of every feature without the batch dimension: ``(C, H, W)``, or ``(D,)``
            for the pooled vector, which is the last one.
        labels: class of every training sample, int64 ``[N]``, in index order.
        spots: the user's choice of spots, or None for the distiller's own. Negative indices count from the end.
        feat_dim: width of the embeddings of CC and CRD.
        pair: ``"teacher-student"``, for messages.
    """

    student: Sequence[Shape]
    teacher: Sequence[Shape]
    labels: Tensor
    spots: Sequence[tuple[int, int]] | None = None
    feat_dim: int = 128
    pair: str = "teacher-student"


class Distiller(nn.Module):
    """Base class of the distillers. A subclass overrides `default_spots` and `spot_loss`; one whose loss needs
    more than the two features of its spot overrides `forward` instead. Modules that it assigns to itself are
    trained together with the student.

    Attributes:
        spots: the resolved spots, strictly increasing on both sides, indices not negative.
        default_weight: the published β, used where the config does not give ``kd.loss_weights.other_kd``.
    """

    default_weight: ClassVar[float] = 1.0

    def __init__(self, setting: Setting):
        super().__init__()
        chosen = self.default_spots(setting) if setting.spots is None else setting.spots
        self.spots = resolve_spots(chosen, setting)

    def default_spots(self, setting: Setting) -> list[tuple[int, int]]:
        """Pairs of feature indices (student's, teacher's); negative ones count from the end."""
        raise NotImplementedError

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        """Loss of spot number `k` over the chosen samples, times the chosen share ``n / B``; a scalar.

        Args:
            student, teacher: the two features of the spot, ``[B, C, H, W]`` or ``[B, D]``.
            gate: ``[B]``, 1 where the sample is chosen. With none chosen the loss is 0, never NaN.
        """
        raise NotImplementedError

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], gates: Tensor, batch: Batch) -> Tensor:
        """Loss of every spot, ``[K]``.

        Args:
            student, teacher: all features of both networks, of the whole batch.
            gates: ``[B, K]`` zeros and ones, no gradient; column ``k`` belongs to ``self.spots[k]``.
        """
        losses = [
            self.spot_loss(k, student[spot.student], teacher[spot.teacher], gates[:, k], batch)
            for k, spot in enumerate(self.spots)
        ]
        return torch.stack(losses) if losses else gates.new_zeros(0)

    def main_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained together with the student."""
        return self.parameters()

    def pretraining_parameters(self, student: StagedModel) -> list[nn.Parameter]:
        """What is trained alone, before everything else; empty if the distiller has no such phase."""
        return []

    def pretraining_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Loss of the pre-training phase, a scalar, from all features of both networks."""
        raise NotImplementedError


def all_middle(setting: Setting) -> list[tuple[int, int]]:
    """Features ``1 .. n - 2`` of both networks, paired in order, as many as the shallower one has."""
    depth = min(len(setting.student), len(setting.teacher))
    return [(k, k) for k in range(1, depth - 1)]


def resolve_spots(spots: Sequence[tuple[int, int]], setting: Setting) -> list[Spot]:
    """Make indices non-negative and check that the routed networks can be stitched together at `spots`.

    Raises:
        UserError: an index is out of range, a map is paired with a vector, or the order is not strictly increasing.
    """
    resolved = []
    for spot in spots:
        indices = []
        for side, index, shapes in zip(("student", "teacher"), spot, (setting.student, setting.teacher)):
            if not -len(shapes) <= index < len(shapes):
                raise UserError(
                    f"kd_loss.spots {list(spot)}: the {side} of {setting.pair} has features 0 to {len(shapes) - 1}"
                )
            indices.append(index % len(shapes))
        s, t = Spot(*indices)
        if len(setting.student[s]) != len(setting.teacher[t]):
            raise UserError(
                f"kd_loss.spots {list(spot)}: {setting.pair} would pair {describe(setting.student[s])} (student) with "
                f"{describe(setting.teacher[t])} (teacher); pair maps with maps and the pooled vector with the pooled vector"
            )
        resolved.append(Spot(s, t))
    for before, after in zip(resolved, resolved[1:]):
        if after.student <= before.student or after.teacher <= before.teacher:
            raise UserError(
                f"kd_loss.spots: {list(after)} after {list(before)}; both indices must grow from spot to spot"
            )
    return resolved


def describe(shape: Shape) -> str:
    """``"a 64x8x8 map"`` or ``"a vector of 256"``."""
    return f"a vector of {shape[0]}" if len(shape) == 1 else f"a {'x'.join(map(str, shape))} map"
