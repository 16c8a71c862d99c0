"""Which spots are distilled, when, and for which classes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.report.curves import with_epochs
from utils.report.groups import Group
from utils.report.style import (
    PANEL,
    REFERENCE,
    SHARE_MAP,
    chunks,
    epoch_axis,
    label_width,
    legend,
    log_axis,
    run_line,
    styled,
)
from utils.run_folder.read import Run
from utils.run_folder.records import GateShares

ROWS_PER_FIGURE = 8
ANNOTATED_CLASSES = 40  # with more, a cell is too low for its number
LABELLED_CLASSES = 60


def share_figures(groups: Sequence[Group]) -> Iterator[Figure]:
    """Share of training samples distilled at each spot over epochs: a row for each group, a column for each spot."""

    def draw(panel: Axes, run: Run, label: str) -> None:
        run_line(panel, run, 100 * run.curve(f"train.gate/{label}"))
        panel.set(ylim=(-3, 103), yticks=(0, 50, 100))

    yield from _grids(groups, lambda run: run.has_policy, lambda run: run.gate_labels, draw, "distilled (%)")


def ratio_figures(groups: Sequence[Group]) -> Iterator[Figure]:
    """How hard each spot of a balanced run would pull, over epochs; the cap as a dotted line."""

    def draw(panel: Axes, run: Run, label: str) -> None:
        run_line(panel, run, run.curve(f"train.ratio/{label}").clip(lower=1e-3))
        panel.axhline(run.settings["kd.balance"], color=REFERENCE, ls=":", lw=1)
        log_axis(panel)

    yield from _grids(groups, is_balanced, lambda run: run.gate_labels[:-1], draw, "pull of β")


def is_balanced(run: Run) -> bool:
    return bool(run.settings.get("kd.balance")) and len(run.gate_labels) > 1


def _grids(
    groups: Sequence[Group],
    shown: Callable[[Run], bool],
    labels_of: Callable[[Run], list[str]],
    draw: Callable[[Axes, Run, str], None],
    ylabel: str,
) -> Iterator[Figure]:
    """A row for each group that has runs to be shown, a column for each of its labels."""
    rows = [(group, runs) for group in groups if (runs := [run for run in with_epochs(group.runs) if shown(run)])]
    for piece in chunks(rows, ROWS_PER_FIGURE):
        with styled():
            yield _grid(piece, labels_of, draw, ylabel)


def _grid(rows: Sequence[tuple[Group, list[Run]]], labels_of, draw, ylabel: str) -> Figure:
    columns = max(len(labels_of(runs[0])) for _, runs in rows) or 1
    size = (max(columns * PANEL[0] * 0.62, 4.2), len(rows) * PANEL[1] * 0.85 + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for line, (group, runs) in zip(axes, rows):
        labels = labels_of(runs[0])
        for panel, label in zip(line, labels):
            for run in runs:
                draw(panel, run, label)
            epoch_axis(panel, max(run.epochs for run in runs))
            panel.set_title(label)
            panel.tick_params(labelleft=panel is line[0])
        for empty in line[len(labels) :]:
            empty.remove()
        words = [group.first.pair, group.first.distiller, *group.settings.split(), ylabel]
        line[0].set_ylabel("\n".join(words), fontsize=8)
    legend(figure, [run for _, runs in rows for run in runs])
    return figure


def class_heatmap(gates: GateShares, class_names: Sequence[str] | None, title: str) -> Figure:
    """Share of each class's samples distilled at each spot in one epoch; classes sorted by their mean share.

    Args:
        class_names: None numbers the classes.
    """
    count, spots = gates.shares.shape
    order = np.argsort(-np.nan_to_num(gates.shares.mean(axis=1), nan=-1), kind="stable")
    names = [class_names[k] if class_names else str(k) for k in order]
    every = -(-count // LABELLED_CLASSES)
    with styled():
        height = 1.3 + (0.22 * count if count <= LABELLED_CLASSES else 10)
        figure = Figure(figsize=(0.85 * spots + 1.8 + label_width(names), height), layout="constrained")
        panel = figure.subplots()
        shares = 100 * gates.shares[order]
        image = panel.imshow(shares, aspect="auto", cmap=SHARE_MAP, vmin=0, vmax=100, interpolation="nearest")
        for (y, x), share in np.ndenumerate(shares if count <= ANNOTATED_CLASSES else shares[:0]):
            if not np.isnan(share):
                ink = "black" if share > 55 else "white"
                panel.text(x, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7)
        panel.set_yticks(range(0, count, every), names[::every], fontsize=7)
        panel.set_xticks(range(spots), gates.gates)
        panel.xaxis.tick_top()
        panel.grid(visible=False)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        thinned = "" if every == 1 else f"; 1 in {every} named"
        panel.set(xlabel=f"epoch {gates.epoch}", ylabel=f"class (sorted by mean share{thinned})")
        figure.colorbar(image, label="samples distilled (%)", shrink=0.6, aspect=25)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure
