"""Whether a policy still chooses, told by the shares of samples that were distilled at each spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal

from distillers.spot_adaptive.selection import SELECTIONS

CERTAIN = 0.995  # share of the samples that counts as all of them

Where = Literal["everywhere", "nowhere"]


@dataclass(frozen=True)
class NoChoice:
    """A policy that treats all samples alike.

    Attributes:
        selection: one that has a policy.
        where: at which spots the student is distilled.
        since: the first epoch from which on this holds.
    """

    selection: str
    where: Where
    since: int

    def __str__(self) -> str:
        who = "the opposite of the policy" if self.selection == "anti" else "the policy"
        share, like = {
            "everywhere": (f">= {100 * CERTAIN:g}", "as fixed does"),
            "nowhere": (f"<= {100 * (1 - CERTAIN):g}", "as if there were no teacher"),
        }[self.where]
        return f"{who} distilled {self.where} ({share} % at every spot) since epoch {self.since}, {like}"

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


def _where(record: dict[str, Any]) -> Where | None:
    """Where the student was distilled in an epoch; None if only in some places."""
    shares = [share for name, share in record["train"].items() if name.startswith("gate/")]
    if shares and min(shares) >= CERTAIN:
        return "everywhere"
    return "nowhere" if shares and max(shares) <= 1 - CERTAIN else None
