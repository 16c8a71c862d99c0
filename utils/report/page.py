"""One self-contained HTML page: tables, figures and their captions, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from utils.report.style import png
from utils.report.table import Table


@dataclass(frozen=True)
class ShownTable:
    """A table.

    Attributes:
        links: addresses of the cells that lead somewhere, by what stands in them.
    """

    content: Table
    caption: str
    sortable: bool = False
    links: dict[str, str] = field(default_factory=dict)


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

    @classmethod
    def draw(cls, name: str, caption: str, figure: Figure, *, photographs: bool = False) -> ShownFigure:
        data = png(figure, photographs=photographs)
        return cls(_slug(name), caption, data, round(figure.get_figwidth() * 96))

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


@dataclass
class Section:
    """A part of the page.

    Attributes:
        detail: of a single run; the table of contents lists these apart.
        folder: of that run, and its address.
    """

    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[ShownTable] = field(default_factory=list)
    figures: list[ShownFigure] = field(default_factory=list)
    detail: bool = False
    folder: tuple[str, str] | None = None


def render(title: str, subtitle: str, unfinished: str, sections: list[Section]) -> str:
    """The page as HTML; every text in it is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, subtitle=subtitle, unfinished=unfinished, sections=sections)


def address(target: Path, page: Path) -> str:
    """How a page in the folder `page` links to a folder."""
    return quote(Path(os.path.relpath(target.resolve(), page.resolve())).as_posix()) + "/"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
