"""Whether a policy still chooses, read off the shares of samples that were distilled at each spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

from utils.run_folder.records import Epoch

CERTAIN = 0.995  # share of the samples that counts as all of them

_LIKE = {"everywhere": "as fixed does", "nowhere": "as if there were no teacher"}


@dataclass(frozen=True)
class NoChoice:
    """A policy that treats all samples alike.

    Attributes:
        selection: ``adaptive`` or ``anti``.
        where: at which spots the student is distilled.
        since: the first epoch from which on this holds.
    """

    selection: str
    where: Literal["everywhere", "nowhere"]
    since: int

    def __str__(self) -> str:
        who = "the policy" if self.selection == "adaptive" else "the opposite of the policy"
        share = f">= {100 * CERTAIN:g}" if self.where == "everywhere" else f"<= {100 * (1 - CERTAIN):g}"
        return f"{who} distilled {self.where} ({share} % at every spot) since epoch {self.since}, {_LIKE[self.where]}"

    @property
    def short(self) -> str:
        """For a table: ``"everywhere since 3"``."""
        return f"{self.where} since {self.since}"


def no_choice(selection: str, records: Sequence[Epoch]) -> NoChoice | None:
    """What the policy did in the last epochs, if that is the same for all samples at all spots; else None.

    Args:
        records: the epochs of the training proper, in order.
    """
    if selection not in ("adaptive", "anti"):
        return None
    where = _where(records[-1]) if records else None
    if where is None:
        return None
    epochs = list(takewhile(lambda record: _where(record) == where, reversed(records)))
    return NoChoice(selection, where, epochs[-1]["epoch"])


def _where(record: Epoch) -> Literal["everywhere", "nowhere"] | None:
    """Where the student was distilled in an epoch; None if only here and there."""
    shares = [share for name, share in record["train"].items() if name.startswith("gate/")]
    if not shares:
        return None
    if min(shares) >= CERTAIN:
        return "everywhere"
    return "nowhere" if max(shares) <= 1 - CERTAIN else None
