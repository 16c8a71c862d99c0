"""Means over seeds and paired differences."""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection
from dataclasses import dataclass

from scipy.stats import t as student_t

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Mean and sample standard deviation (n - 1) of `n` values; no deviation for a single one."""

    mean: float
    std: float | None
    n: int

    def __str__(self) -> str:
        spread = "" if self.std is None else f"±{self.std:.2f}"
        return f"{self.mean:.2f}{spread} ({self.n})"


@dataclass(frozen=True)
class Difference:
    """Mean of `n` paired differences and half the width of its 95 % t interval; no interval for a single pair."""

    mean: float
    half_width: float | None
    n: int

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.2f} ({self.n})"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.2f} [{low:+.2f}, {high:+.2f}] ({self.n})"


def summarise(values: Collection[float]) -> Summary | None:
    """None for no values."""
    if not values:
        return None
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def paired_difference(ours: dict[int, float], base: dict[int, float]) -> Difference | None:
    """`ours` - `base` over the seeds that both have; None if there is no such seed.

    Args:
        ours, base: a value per seed.
    """
    differences = [ours[seed] - base[seed] for seed in ours.keys() & base.keys()]
    summary = summarise(differences)
    if summary is None or summary.std is None:
        return summary and Difference(summary.mean, None, 1)
    quantile = float(student_t.ppf((1 + CONFIDENCE) / 2, summary.n - 1))
    return Difference(summary.mean, quantile * summary.std / math.sqrt(summary.n), summary.n)
