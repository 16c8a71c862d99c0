"""The figures that the SAKD paper reports, to stand beside ours (``published.csv``, validation top-1 in percent)."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from utils.registry import fold

_FILE = Path(__file__).with_name("published.csv")
_TEACHER, _STUDENT = "T", "S"


@dataclass(frozen=True)
class Published:
    """One row of the paper; None where it has no figure."""

    teacher: float | None = None
    single: float | None = None
    fixed: float | None = None
    adaptive: float | None = None

    @property
    def difference(self) -> float | None:
        """adaptive - fixed."""
        return None if self.fixed is None or self.adaptive is None else self.adaptive - self.fixed


def published(dataset: str, teacher: str, student: str, distiller: str) -> Published:
    """The paper's figures; all None for what it did not run."""
    table = _read()
    key = (fold(dataset), teacher, student)  # models differ by case alone: resnet110, ResNet101
    fixed, adaptive = table.get((*key, fold(distiller)), (None, None))
    alone = (table.get((*key, fold(role)), (None, None))[0] for role in (_TEACHER, _STUDENT))
    return Published(*alone, fixed, adaptive)


@cache
def _read() -> dict[tuple[str, ...], tuple[float | None, float | None]]:
    with _FILE.open(encoding="utf-8", newline="") as file:
        return {
            (fold(row["dataset"]), row["teacher"], row["student"], fold(row["method"])): (
                _number(row["standard"]),
                _number(row["adaptive"]),
            )
            for row in csv.DictReader(file)
        }


def _number(text: str) -> float | None:
    return float(text) if text else None
