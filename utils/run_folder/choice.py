"""Whether a policy still chooses, told by the shares of samples that were distilled at each spot."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from distillers.spot_adaptive.selection import SELECTIONS

CERTAIN = 0.995  # share of the samples that counts as all of them


def no_choice(selection: str, records: Sequence[dict[str, Any]]) -> str | None:
    """``"everywhere since 3"``: where the policy distils by now and since when, if all samples are alike; else None.

    Everywhere: the run is like one of the plain distiller. Nowhere: it is like one without a teacher.

    Args:
        selection: ``kd.selection``; only some have a policy.
        records: the epochs of the training proper, in order, see `records.read_epochs`.
    """
    has_policy = selection in SELECTIONS and SELECTIONS[selection].policy
    where = _where(records[-1]) if records and has_policy else None
    if where is None:
        return None
    epochs = list(takewhile(lambda record: _where(record) == where, reversed(records)))
    return f"{where} since {epochs[-1]['epoch']}"


def _where(record: dict[str, Any]) -> str | None:
    """Where the student was distilled in an epoch; None if only in some places."""
    shares = [share for name, share in record["train"].items() if name.startswith("gate/")]
    if shares and min(shares) >= CERTAIN:
        return "everywhere"
    return "nowhere" if shares and max(shares) <= 1 - CERTAIN else None
