"""Tables of text as Markdown."""

from __future__ import annotations

import pandas as pd


def markdown(table: pd.DataFrame) -> str:
    """Aligned, so that it reads well on a terminal too; every cell is text."""
    lines = [list(table.columns), *table.to_numpy().tolist()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    head, *body = (
        "| " + " | ".join(text.replace("|", "\\|").ljust(width) for text, width in zip(line, widths)) + " |"
        for line in lines
    )
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
