"""One self-contained HTML page: tables, figures and their captions, nothing fetched from elsewhere."""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from utils.report.style import png
from utils.report.tables import Table


@dataclass(frozen=True)
class ShownTable:
    content: Table
    caption: str
    sortable: bool = False


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
    def draw(cls, name: str, caption: str, figure: Figure) -> ShownFigure:
        return cls(_slug(name), caption, png(figure), round(figure.get_figwidth() * 96))

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode("ascii")


@dataclass
class Section:
    title: str
    texts: list[str] = field(default_factory=list)
    tables: list[ShownTable] = field(default_factory=list)
    figures: list[ShownFigure] = field(default_factory=list)


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


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")
