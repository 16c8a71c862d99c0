"""What a distiller is: it says *what* to distil; the gates it is handed say *where*."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from models.staged import StagedModel
from utils.errors import UserError

Shape = tuple[int, ...]


class Spot(NamedTuple):
    """Where to distil: the index of a student feature and that of a teacher feature."""

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
    """Base class of the distillers. A subclass names its `loss`, or overrides `spot_loss` if that takes more than the
    two features and the gate; one whose loss needs more than the two features of its spot overrides `forward`. Modules
    that it assigns to itself are trained together with the student. Constants of the method are keyword arguments of
    its constructor, with the published values as defaults.

    Attributes:
        spots: the resolved spots, strictly increasing on both sides, indices not negative.
        loss: the function ``loss(student, teacher, gate)``, see `spot_loss`.
        published_spots: pairs of feature indices (student's, teacher's), negative ones counted from the end; None for
            all middle features.
        default_weight: the published β, used where the config does not give ``kd.loss_weights.other_kd``.
        warmup_epochs: over how many epochs β grows to its full value, if ``kd.warmup_epochs`` does not say.
        logit_loss: what is matched at the logits, if ``kd_loss.logits`` does not say; a name of `distillers.logits`.
        maps_only: the loss looks at positions, so the pooled vector cannot be a spot.
        logits_only: the distiller has no spots, and matches the logits alone.
        capturable: on a GPU, a step may be recorded once and repeated as a CUDA graph, in which Python does not run
            again. A distiller whose steps look at values on the device (``.item()``, ``if loss > 1``) or whose Python
            does something else in every step (a list that grows) says False here. Numbers and tensors that it replaces
            in every step, instead of writing into them, and random numbers that it draws on the CPU are detected
            automatically.

    Raises:
        UserError: the spots do not exist, do not fit together, or are of no use to this distiller; or an option
            is impossible.
    """

    loss: ClassVar[Callable[..., Tensor] | None] = None
    published_spots: ClassVar[Sequence[tuple[int, int]] | None] = None
    default_weight: ClassVar[float] = 1.0
    warmup_epochs: ClassVar[int] = 0
    logit_loss: ClassVar[str] = "kl"
    maps_only: ClassVar[bool] = False
    logits_only: ClassVar[bool] = False
    capturable: ClassVar[bool] = True

    def __init__(self, setting: Setting):
        super().__init__()
        own = type(self).loss, type(self).spot_loss, type(self).forward
        if own == (None, Distiller.spot_loss, Distiller.forward) and not self.logits_only:
            raise UserError(f"{type(self).__name__}: names no loss, and overrides neither spot_loss nor forward")
        chosen = self.default_spots(setting) if setting.spots is None else setting.spots
        if setting.spots is not None and (self.logits_only or not chosen):
            wants = "distils the logits alone" if self.logits_only else "needs one or more"
            raise UserError(f"kd_loss.spots: {type(self).__name__} {wants}; leave them out, or take another distiller")
        self.spots = resolve_spots(chosen, setting, maps_only=self.maps_only)
        if not self.spots and not self.logits_only:
            found = f"{len(setting.student)} student and {len(setting.teacher)} teacher features"
            raise UserError(
                f"{type(self).__name__} finds no spot in {setting.pair} ({found}); kd_loss.spots=[[<student>, "
                "<teacher>]] chooses some, distiller=kd distils the logits alone"
            )

    def default_spots(self, setting: Setting) -> list[tuple[int, int]]:
        """The spots where the user does not choose any: `published_spots`, unless they depend on the networks."""
        return all_middle(setting) if self.published_spots is None else list(self.published_spots)

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        """Loss of spot number `k` over the chosen samples, times the chosen share ``n / B``; a scalar.

        Args:
            k: index of the spot in `self.spots`.
            student, teacher: the two features of the spot, ``[B, C, H, W]`` or ``[B, D]``; the teacher's is detached.
            gate: ``[B]``, 1 where the sample is chosen. With none chosen the loss is 0, never NaN.
        """
        return type(self).loss(student, teacher, gate)

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], gates: Tensor, batch: Batch) -> Tensor:
        """Loss of every spot, ``[K]``.

        Args:
            student, teacher: all features of both networks, of the whole batch. If they are in half precision, call
                this under the same autocast, which the distiller's modules need; the losses leave it.
            gates: ``[B, K]`` zeros and ones, no gradient; column ``k`` belongs to ``self.spots[k]``.
        """
        losses = [
            scalar(
                self.spot_loss(k, student[spot.student], teacher[spot.teacher].detach(), gates[:, k], batch),
                f"distiller {type(self).__name__}: spot_loss of spot {k}",
            )
            for k, spot in enumerate(self.spots)
        ]
        return torch.stack(losses) if losses else gates.new_zeros(0)

    def main_parameters(self) -> Iterable[nn.Parameter]:
        """What is trained together with the student."""
        return self.parameters()

    @classmethod
    def has_pretraining(cls) -> bool:
        """Whether the distillers of this class may have a phase of their own, which comes before everything else."""
        return cls.pretraining_parameters is not Distiller.pretraining_parameters

    def pretraining_parameters(self, student: StagedModel) -> list[nn.Parameter]:
        """What that phase trains; empty if this distiller has none."""
        return []

    def pretraining_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Loss of the pre-training phase, a scalar, from all features of both networks."""
        raise NotImplementedError


def scalar(loss: Tensor, what: str) -> Tensor:
    """`loss`, if it is one number.

    Raises:
        UserError: it is not; the line begins with `what`.
    """
    if isinstance(loss, Tensor) and loss.dim() == 0:
        return loss
    found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
    raise UserError(f"{what} gives {found}, must be a scalar tensor")


def all_middle(setting: Setting) -> list[tuple[int, int]]:
    """Features ``1 .. n - 2`` of both networks, paired in order, as many as the shallower one has."""
    depth = min(len(setting.student), len(setting.teacher))
    return [(k, k) for k in range(1, depth - 1)]


def resolve_spots(spots: Sequence[tuple[int, int]], setting: Setting, *, maps_only: bool = False) -> list[Spot]:
    """Make indices non-negative and check that the routed networks can be stitched together at `spots`.

    Raises:
        UserError: an index is out of range, two features do not fit together, or the order is not strictly increasing.
    """
    resolved: list[Spot] = []
    for spot in spots:
        for side, index, shapes in zip(("student", "teacher"), spot, (setting.student, setting.teacher)):
            if not -len(shapes) <= index < len(shapes):
                raise UserError(
                    f"kd_loss.spots {list(spot)}: the {side} of {setting.pair} has features 0 to {len(shapes) - 1}"
                )
        s, t = spot[0] % len(setting.student), spot[1] % len(setting.teacher)
        student, teacher = setting.student[s], setting.teacher[t]
        if len(student) != len(teacher) or (maps_only and len(student) != 3):
            raise UserError(
                f"kd_loss.spots {list(spot)}: {setting.pair} has {describe(student)} (student) and {describe(teacher)} "
                f"(teacher) there; the distiller takes two maps{'' if maps_only else ' or two vectors'}"
            )
        if resolved and not (s > resolved[-1].student and t > resolved[-1].teacher):
            raise UserError(
                f"kd_loss.spots: {[s, t]} after {list(resolved[-1])}; both indices must grow from spot to spot"
            )
        resolved.append(Spot(s, t))
    return resolved


def describe(shape: Shape) -> str:
    """``"a 64x8x8 map"`` or ``"a vector of 256"``."""
    return f"a vector of {shape[0]}" if len(shape) == 1 else f"a {'x'.join(map(str, shape))} map"
