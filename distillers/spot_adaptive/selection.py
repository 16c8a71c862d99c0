"""The selections, which say where the student distils. Listing them imports no PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


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
