"""How every figure looks: size, type, and colours that colour-blind people tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

# Okabe and Ito, "Color universal design", 2008.
SELECTION_COLORS = {
    "adaptive": "#D55E00",
    "fixed": "#0072B2",
    "anti": "#CC79A7",
    "random": "#009E73",
    "single": "#767676",
}
REFERENCE = "#222222"
SHARE_MAP = "cividis"  # even in lightness, and the same to most colour-blind people

DPI = 144
PANEL = (3.3, 2.3)  # inches
PANELS_PER_FIGURE = 12
_PANELS_PER_ROW = 3

_RC = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
}


@contextmanager
def styled() -> Iterator[None]:
    """Settings for everything drawn inside; nobody else's figures change."""
    with mpl.rc_context(_RC):
        yield


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of one size, at most three in a row; a single one is larger."""
    columns = min(count, _PANELS_PER_ROW)
    rows = -(-count // columns)
    width, height = (6.4, 3.8) if count == 1 else (columns * PANEL[0], rows * PANEL[1] + 0.5)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def spot_colors(labels: Sequence[str]) -> list[str]:
    """One colour per gate: from dark (shallow) to light (deep) along the network, the logits' apart."""
    scale = mpl.colormaps["viridis"]
    steps = max(len(labels) - 2, 1)
    return [to_hex(scale(0.85 * position / steps)) for position in range(len(labels) - 1)] + [
        SELECTION_COLORS["adaptive"]
    ]


def figure_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    """One legend for all panels, above them."""
    columns = 8 if figure.get_figwidth() > 7 else 4
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.6)


def mark(label: str, color: str = REFERENCE, **style) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, label=label, **style)


def unfinished_mark() -> Line2D:
    return mark("unfinished", marker="o", mfc="white", ls="")


def whole_epochs(axes: Axes, last: int) -> None:
    """An x axis of epochs from 1 to `last`, ticks at whole numbers."""
    axes.set_xlim(1 - 0.01 * last, last * 1.01) if last > 1 else axes.set_xlim(0.5, 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, of which even a narrow range shows several."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def chunks(items: Sequence, size: int) -> Iterator[Sequence]:
    """`items` in pieces of `size`; the last may be shorter."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


def shortened(name: str, length: int = 22) -> str:
    """`name` in at most `length` characters."""
    return name if len(name) <= length else name[: length - 1] + "…"


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
