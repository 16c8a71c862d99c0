"""The parts of a report, and how they become one HTML page that fetches nothing from elsewhere, or Markdown."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from utils.report.table import markdown


@dataclass(frozen=True)
class ShownFigure:
    """A drawn figure.

    Attributes:
        name: of its file, without ending.
        caption: says what is seen.
        data: PNG.
        width: CSS pixels.
    """

    name: str
    caption: str
    data: bytes
    width: int


@dataclass
class Section:
    """A part of the page.

    Attributes:
        lead: texts above the tables; the others are below.
        tables: by their captions.
        detail: of a single run; the table of contents lists these apart.
        links: addresses of the cells and texts that are folders.
    """

    title: str
    texts: list[str] = field(default_factory=list)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    figures: list[ShownFigure] = field(default_factory=list)
    detail: bool = False
    links: dict[str, str] = field(default_factory=dict)
    lead: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Title, tables and texts."""
        tables = [part for caption, table in self.tables.items() for part in (f"{caption}:", markdown(table))]
        return "\n\n".join([f"## {self.title}", *self.lead, *tables, *self.texts])

    def latex(self) -> str:
        """The tables, for ``\\usepackage{booktabs}``."""
        parts = (
            table.replace("→", "to", regex=True).to_latex(index=False, escape=True, caption=caption.replace("%", "\\%"))
            for caption, table in self.tables.items()
        )
        return "\n".join(parts)


def render(title: str, texts: list[str], sections: list[Section]) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
    return environment.get_template("page.html.j2").render(title=title, texts=texts, sections=sections)


def address(target: Path, page: Path) -> str:
    """How a page in the folder `page` links to a folder."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve())).as_posix(), errors="surrogateescape") + "/"


def slug(text: str) -> str:
    """A name for a file."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")[:150]
