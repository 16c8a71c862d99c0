"""Means over seeds and paired differences."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pandas as pd
from scipy.special import stdtrit

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """Mean of `n` paired differences and half the width of its 95 % t interval; no interval for a single pair."""

    mean: float
    half_width: float | None
    n: int

    @property
    def is_significant(self) -> bool:
        """Its interval does not contain 0."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    def __str__(self) -> str:
        if self.half_width is None:
            return f"{self.mean:+.2f} ({self.n})"
        low, high = self.mean - self.half_width, self.mean + self.half_width
        return f"{self.mean:+.2f} [{low:+.2f}, {high:+.2f}] ({self.n})"


def paired_difference(ours: pd.Series, base: pd.Series) -> Difference | None:
    """`ours` - `base` over the seeds that both have; None if there is no such seed.

    Args:
        ours, base: a value for each seed, which is the index.
    """
    differences = (ours - base).dropna()
    n = len(differences)
    if n < 2:
        return Difference(float(differences.iloc[0]), None, 1) if n else None
    quantile = stdtrit(n - 1, (1 + CONFIDENCE) / 2)  # of Student's t; scipy.stats would take a second to import
    return Difference(float(differences.mean()), float(quantile * differences.std() / math.sqrt(n)), n)


def mean_text(values: pd.Series, separator: str = "±") -> str:
    """``"71.00±1.00 (3)"``: mean, sample standard deviation (n - 1) and number; empty for no values."""
    if values.empty:
        return ""
    spread = f"{separator}{values.std():.2f}" if len(values) > 1 else ""
    return f"{values.mean(skipna=False):.2f}{spread} ({len(values)})"
