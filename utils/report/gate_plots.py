"""Which spots are distilled, when, and for which classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from utils.report.curves import by_panel, selection_marks
from utils.report.style import (
    PANEL,
    SELECTION_COLORS,
    SHARE_MAP,
    chunks,
    figure_legend,
    shortened,
    styled,
    unfinished_mark,
    whole_epochs,
)
from utils.run_folder.read import GateShares, Run

ROWS_PER_FIGURE = 8
ANNOTATED_CLASSES = 40  # beyond, a cell is too low for its number
LABELLED_CLASSES = 60


def share_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Share of training samples distilled at each spot over epochs: a row per pair and distiller, a column per spot."""
    groups = by_panel([run for run in runs if run.has_policy and run.gate_labels])
    for piece in chunks(groups, ROWS_PER_FIGURE):
        with styled():
            yield _share_grid(piece)


def _share_grid(groups: Sequence[Sequence[Run]]) -> Figure:
    columns = max(len(run.gate_labels) for group in groups for run in group)
    size = (max(columns * PANEL[0] * 0.62, 4.2), len(groups) * PANEL[1] * 0.85 + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(groups), columns, squeeze=False)
    for line, group in zip(axes, groups):
        labels = group[0].gate_labels
        for panel, label in zip(line, labels):
            for run in group:
                _share_curve(panel, run, f"gate/{label}")
            panel.set(title=label, ylim=(-3, 103), yticks=(0, 50, 100))
            panel.tick_params(labelleft=panel is line[0])
            whole_epochs(panel, max(run.epochs for run in group))
        for empty in line[len(labels) :]:
            empty.remove()
        line[0].set_ylabel(f"{group[0].pair}\n{group[0].distiller}\ndistilled (%)")
    figure.supxlabel("epoch", fontsize=9)
    shown = [run for group in groups for run in group]
    figure_legend(figure, selection_marks(shown) + [unfinished_mark()] * any(r.status != "finished" for r in shown))
    return figure


def _share_curve(panel, run: Run, key: str) -> None:
    epochs = [record["epoch"] for record in run.records]
    shares = [100 * record["train"].get(key, np.nan) for record in run.records]
    color = SELECTION_COLORS[run.selection]
    panel.plot(epochs, shares, color=color, alpha=0.85, marker="." if len(epochs) == 1 else "", clip_on=False)
    if run.status != "finished":
        panel.plot(epochs[-1], shares[-1], "o", ms=5, mfc="white", color=color)


def class_heatmap(gates: GateShares, class_names: Sequence[str] | None, title: str) -> Figure:
    """Share of each class's samples distilled at each spot in one epoch; classes sorted by their mean share.

    Args:
        class_names: None numbers the classes.
    """
    count, spots = gates.shares.shape
    order = np.argsort(-np.nan_to_num(gates.shares.mean(axis=1), nan=-1), kind="stable")
    names = [class_names[k] if class_names else str(k) for k in order]
    with styled():
        height = 1.3 + (0.22 * count if count <= LABELLED_CLASSES else 10)
        figure = Figure(figsize=(0.85 * spots + 2.8, height), layout="constrained")
        panel = figure.subplots()
        shares = 100 * gates.shares[order]
        image = panel.imshow(shares, aspect="auto", cmap=SHARE_MAP, vmin=0, vmax=100, interpolation="nearest")
        if count <= ANNOTATED_CLASSES:
            _write_shares(panel, shares)
        every = -(-count // LABELLED_CLASSES)
        panel.set_yticks(range(0, count, every), [shortened(name) for name in names[::every]], fontsize=7)
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


def _write_shares(panel, shares: np.ndarray) -> None:
    for (y, x), share in np.ndenumerate(shares):
        if not np.isnan(share):
            ink = "black" if share > 55 else "white"
            panel.text(x, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7)
