"""How every figure looks: size, type, and colours that colour-blind people tell apart."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from textwrap import fill

import matplotlib as mpl
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from utils.run_folder.read import Run

# Okabe and Ito, "Color universal design", 2008; in the order in which lines are drawn, the last on top.
SELECTION_COLORS = {
    "single": "#767676",
    "fixed": "#0072B2",
    "random": "#009E73",
    "anti": "#CC79A7",
    "shuffled": "#56B4E9",
    "adaptive": "#D55E00",
}
REFERENCE = "#222222"
SHARE_MAP = "cividis"  # even in lightness, and the same to most colour-blind people

DPI = 144
TITLE_SIZE = 9  # points
PANEL = (3.3, 2.3)  # inches
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
    "text.parse_math": False,  # $ in the name of a class is a letter
}


@contextmanager
def styled() -> Iterator[None]:
    """Settings for everything drawn inside, or in a function that it decorates; nobody else's figures change."""
    with mpl.rc_context(_RC):
        yield


def panels(count: int) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of one size, at most three in a row; a single one is larger."""
    columns = min(count, _PANELS_PER_ROW)
    rows = -(-count // columns)
    size = (6.4, 3.8) if count == 1 else (columns * PANEL[0], rows * PANEL[1] + 0.5)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for empty in axes[count:]:
        empty.remove()
    return figure, axes[:count]


def run_line(panel: Axes, run: Run, curve: pd.Series, *, pale: bool = False) -> None:
    """One run's values over its epochs, in the colour of its selection.

    Args:
        pale: the line stands behind those that matter.
    """
    color, order = SELECTION_COLORS[run.selection], list(SELECTION_COLORS).index(run.selection)
    width = 1.4 * (2 if run.selection == "fixed" else 1)  # shows on both sides of an adaptive line on top of it
    style = {"color": color, "alpha": 0.4 if pale else 0.85, "zorder": order + 2}
    panel.plot(curve.index, curve, lw=width / (2 if pale else 1), **style, marker="o" if len(curve) == 1 else "", ms=4)
    if not run.is_finished:
        panel.plot(curve.index[-1:], curve[-1:], "o", ms=5, mfc="white", color=color)


def mark(label: str, color: str = REFERENCE, **style) -> Line2D:
    """An entry of a legend."""
    return Line2D([], [], color=color, label=label, **style)


def legend(figure: Figure, runs: Sequence[Run], more: Sequence[Line2D] = ()) -> None:
    """One legend for all panels, above them: the selections of `runs`, and `more`."""
    present = {run.selection for run in runs}
    handles = [mark(name, color) for name, color in SELECTION_COLORS.items() if name in present] + [*more]
    if any(not run.is_finished for run in runs):
        handles.append(mark("unfinished", marker="o", mfc="white", ls=""))
    figure_legend(figure, handles)


def figure_legend(figure: Figure, handles: Sequence[Line2D]) -> None:
    columns = 8 if figure.get_figwidth() > 7 else 4
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, handlelength=1.6)


def figure_title(figure: Figure, text: str) -> None:
    """A title above everything."""
    figure.suptitle(title_lines(figure, text), x=0.01, ha="left", fontsize=TITLE_SIZE)


def title_lines(figure: Figure, text: str) -> str:
    """A title in as many lines as it takes."""
    return fill(text, int(figure.get_figwidth() / label_width("x", TITLE_SIZE)))


def epoch_axis(axes: Axes, last: int) -> None:
    """An x axis of epochs from 1 to `last`, ticks at whole numbers."""
    axes.set_xlim(1 - 0.01 * last, last * 1.01) if last > 1 else axes.set_xlim(0.5, 1.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.set_xlabel("epoch")


def log_axis(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers, of which even a narrow range shows several."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def label_width(names: Sequence[str], size: float = 7) -> float:
    """Inches that the longest of `names` takes, in type of `size` points, a little more than less."""
    return 0.62 * size / 72 * max(map(len, names), default=0)


def png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    with styled(), warnings.catch_warnings():  # some texts are made only now
        warnings.filterwarnings("ignore", "Glyph .* missing")  # of names in other scripts, which the tables spell
        figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
