"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd


@dataclass(frozen=True)
class Table:
    """Headings and cells, all text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Aligned, so that it reads well on a terminal too."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        head, *body = (
            "| " + " | ".join(text.replace("|", "\\|").ljust(width) for text, width in zip(line, widths)) + " |"
            for line in lines
        )
        return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def markdown(table: pd.DataFrame) -> str:
    """The same of a table of pandas."""
    return Table(list(table.columns), table.to_numpy().tolist()).markdown()
