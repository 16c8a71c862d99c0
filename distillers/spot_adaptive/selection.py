"""The selections, which say where the student distils, and what a policy sees. Listing them imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Seen(NamedTuple):
    """What a policy may look at, of one batch. Nothing here has a gradient: the policy must not move the networks.

    Attributes:
        student, teacher: all features of both networks, ``[B, C, H, W]`` or, the last one, ``[B, D]``; under autocast
            they may be in half precision.
        student_logits, teacher_logits: ``[B, num_classes]``.
        label: ``[B]``.
        epoch: counted from 0, a scalar tensor on the device. It is filled in place, so a captured step may read it.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    student_logits: Tensor
    teacher_logits: Tensor
    label: Tensor
    epoch: Tensor


class Selection(NamedTuple):
    """How the student's gates are made.

    Attributes:
        explanation: where the student distils.
        choose: from the policy's gates ``[B, K + 1]``, without gradient, to those of the student. Without a policy the
            gates are all 1.
        policy: whether it has a policy, see `distillers.spot_adaptive.policy`, which learns in the same way under each.
    """

    explanation: str
    choose: Callable[[Tensor], Tensor]
    policy: bool = False


def _shuffled(gates: Tensor) -> Tensor:
    """Each column is permuted by itself: the share at every spot stays, and chance decides which samples have it.

    In a job of several processes each one permutes its own part of the batch.
    """
    order = gates.new_empty(gates.shape).uniform_().argsort(dim=0)
    return gates.gather(0, order)


def _coins(gates: Tensor) -> Tensor:
    return gates.new_empty(gates.shape).random_(0, 2)


SELECTIONS = {
    "fixed": Selection("everywhere", lambda gates: gates),
    "random": Selection("where a coin says", _coins),
    "anti": Selection("where the policy says not to", lambda gates: 1 - gates, policy=True),
    "shuffled": Selection("as much as the policy says, on random samples", _shuffled, policy=True),
    "adaptive": Selection("where the policy says", lambda gates: gates, policy=True),
}
