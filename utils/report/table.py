"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Headings and cells, all text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    @classmethod
    def of(cls, lines: Sequence[dict[str, str]]) -> Table:
        """From lines with the same headings; a column without any entry is left out."""
        header = [name for name in lines[0] if any(line[name] for line in lines)]
        return cls(header, [[line[name] for name in header] for line in lines])

    def markdown(self) -> str:
        """Aligned, so that it reads well on a terminal too."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        head, *body = (
            "| " + " | ".join(text.replace("|", "\\|").ljust(width) for text, width in zip(line, widths)) + " |"
            for line in lines
        )
        return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])
