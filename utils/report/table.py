"""Tables of text as Markdown."""

from __future__ import annotations

import pandas as pd

from utils.errors import printable


def markdown(table: pd.DataFrame) -> str:
    """Aligned, so that it reads well on a terminal too; every cell is text."""
    texts = [list(table.columns), *table.to_numpy().tolist()]
    lines = [[printable(text).replace("|", "\\|") for text in line] for line in texts]
    widths = [max(map(len, column)) for column in zip(*lines)]
    head, *body = ("| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines)
    return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
