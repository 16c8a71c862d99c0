"""How every figure looks: size, type, and colours that colour-blind people tell apart."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from typing import TypeAlias

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from PIL import Image

from utils.run_folder.read import Run

Dash: TypeAlias = str | tuple[float, tuple[float, ...]]
SeedStyles: TypeAlias = dict[int, tuple[Dash, str]]  # dashes and a marker for each seed

# Okabe and Ito, "Color universal design", 2008.
SELECTION_COLORS = {
    "adaptive": "#D55E00",
    "fixed": "#0072B2",
    "anti": "#CC79A7",
    "random": "#009E73",
    "single": "#767676",
}
REFERENCE = "#222222"
SEED_INK = "#555555"
SEED_DASHES: tuple[Dash, ...] = ("-", (0, (5, 1.6)), (0, (1.6, 1)), (0, (6, 1.2, 1.2, 1.2)))
SEED_MARKERS = "osD^"
NUMBERED_DOTS = 10  # in a panel; more numbers would cover each other
_ORDER = ("single", "fixed", "random", "anti", "adaptive")  # from the bottom to the top, and from left to right
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


def seed_styles(runs: Iterable[Run]) -> SeedStyles:
    """A dash pattern and a marker for each seed; they come round again where there are more seeds."""
    return dict(zip(sorted({run.seed for run in runs}), cycle(zip(SEED_DASHES, SEED_MARKERS))))


def seed_marks(runs: Sequence[Run], styles: SeedStyles) -> list[Line2D]:
    """Entries for the seeds of `runs`; none where there is a single one."""
    seeds: dict[tuple[Dash, str], list[str]] = {}
    for seed in sorted({run.seed for run in runs}):
        seeds.setdefault(styles[seed], []).append(str(seed))
    if sum(map(len, seeds.values())) < 2:
        return []
    as_dots, as_lines = any(len(run.records) == 1 for run in runs), any(len(run.records) > 1 for run in runs)
    return [
        mark(f"seed {', '.join(names)}", SEED_INK, ls=dash if as_lines else "", marker=marker if as_dots else "", ms=4)
        for (dash, marker), names in seeds.items()
    ]


def selection_marks(runs: Iterable[Run]) -> list[Line2D]:
    present = {run.selection for run in runs}
    return [mark(name, color) for name, color in SELECTION_COLORS.items() if name in present]


def run_line(
    panel: Axes,
    run: Run,
    values: Sequence[float],
    styles: SeedStyles,
    *,
    width: float = 1.4,
    pale: bool = False,
) -> None:
    """One run's values over its epochs, in the colour of its selection and the dashes of its seed.

    Args:
        pale: stands behind the lines that matter.
    """
    dash, marker = styles[run.seed]
    color, epochs = SELECTION_COLORS[run.selection], [record["epoch"] for record in run.records]
    if run.selection == "fixed":  # shows on both sides of an adaptive line that it coincides with
        width *= 2
    if pale:
        width /= 2
    single = len(epochs) == 1
    panel.plot(
        epochs,
        values,
        color=color,
        lw=width,
        ls=dash,
        alpha=0.4 if pale else 0.85,
        zorder=_ORDER.index(run.selection) + 2,
        marker=marker if single else "",
        ms=5,
        mfc="none" if pale else color,
        clip_on=not single,
    )
    if run.status != "finished":
        panel.plot(epochs[-1], values[-1], "o", ms=5, mfc="white", color=color)


def run_dots(
    panel: Axes,
    runs: Sequence[Run],
    values: Sequence[float],
    styles: SeedStyles,
    *,
    hollow: bool = False,
    digits: str = ".3g",
) -> None:
    """The values of runs of a single epoch, side by side by selection, since lines would have no length."""
    present = [name for name in _ORDER if name in {run.selection for run in runs}]
    seeds = sorted({run.seed for run in runs})
    for run, value in zip(runs, values):
        shift = 0.5 * (seeds.index(run.seed) - (len(seeds) - 1) / 2) / len(seeds)
        color, x = SELECTION_COLORS[run.selection], present.index(run.selection) + shift
        panel.plot(x, value, styles[run.seed][1], ms=5, color=color, mfc="none" if hollow else color)
        if len(runs) <= NUMBERED_DOTS:
            panel.annotate(
                f"{value:{digits}}",
                (x, value),
                (0, 5),
                textcoords="offset points",
                ha="center",
                fontsize=7,
                color="#404040",
            )
    panel.set_xticks(range(len(present)), present)
    panel.set_xlim(-0.6, len(present) - 0.4)
    panel.grid(axis="x", visible=False)


def is_one_epoch(runs: Sequence[Run]) -> bool:
    """Whether none of the runs goes on for longer than an epoch."""
    return max(run.epochs for run in runs) == 1


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


def label_width(names: Sequence[str], size: float = 7) -> float:
    """Inches that the longest of `names` takes, in type of `size` points, a little more than less."""
    return 0.62 * size / 72 * max(map(len, names), default=0)


def png(figure: Figure, *, photographs: bool = False) -> bytes:
    """The figure as a PNG file.

    Args:
        photographs: keep every colour. Elsewhere 256 will do, in a third of the bytes.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    if photographs:
        return buffer.getvalue()
    image = Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    smaller = io.BytesIO()
    image.save(smaller, format="png", optimize=True)
    return smaller.getvalue()
