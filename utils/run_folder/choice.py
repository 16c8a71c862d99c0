"""Whether a policy still chooses, told by the shares of samples that were distilled at each spot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from distillers.spot_adaptive.selection import SELECTIONS

CERTAIN = 0.995  # share of the samples that counts as all of them
_LIKE = {
    "everywhere": f"everywhere (>= {100 * CERTAIN:g} % at every spot) since epoch {{}}, as fixed does",
    "nowhere": f"nowhere (<= {100 * (1 - CERTAIN):g} % at every spot) since epoch {{}}, as if there were no teacher",
}


class NoChoice(NamedTuple):
    """A policy that treats all samples alike.

    Attributes:
        selection: one that has a policy.
        where: at which spots the student is distilled, ``everywhere`` or ``nowhere``.
        since: the first epoch from which on this holds.
    """

    selection: str
    where: str
    since: int

    def __str__(self) -> str:
        who = "the opposite of the policy" if self.selection == "anti" else "the policy"
        return f"{who} distilled {_LIKE[self.where].format(self.since)}"

    @property
    def short(self) -> str:
        """For a table: ``"everywhere since 3"``."""
        return f"{self.where} since {self.since}"


def no_choice(selection: str, records: Sequence[dict[str, Any]]) -> NoChoice | None:
    """What the policy did in the last epochs, if that is the same for all samples at all spots; else None.

    Args:
        records: the epochs of the training proper, in order, see `records.read_epochs`.
    """
    has_policy = selection in SELECTIONS and SELECTIONS[selection].policy
    where = _where(records[-1]) if records and has_policy else None
    if where is None:
        return None
    epochs = list(takewhile(lambda record: _where(record) == where, reversed(records)))
    return NoChoice(selection, where, epochs[-1]["epoch"])


def _where(record: dict[str, Any]) -> str | None:
    """Where the student was distilled in an epoch; None if only in some places."""
    shares = [share for name, share in record["train"].items() if name.startswith("gate/")]
    if shares and min(shares) >= CERTAIN:
        return "everywhere"
    return "nowhere" if shares and max(shares) <= 1 - CERTAIN else None
