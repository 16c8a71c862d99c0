"""Which spots are distilled, when, and for which classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from matplotlib.figure import Figure

from utils.report.curves import by_panel
from utils.report.settings import Group
from utils.report.style import (
    PANEL,
    SHARE_MAP,
    SeedStyles,
    chunks,
    figure_legend,
    is_one_epoch,
    label_width,
    run_dots,
    run_line,
    seed_marks,
    seed_styles,
    selection_marks,
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
    styles = seed_styles(runs)
    groups = by_panel([run for run in runs if run.has_policy and run.gate_labels])
    for piece in chunks(groups, ROWS_PER_FIGURE):
        with styled():
            yield _share_grid(piece, styles)


def _share_grid(groups: Sequence[Group], styles: SeedStyles) -> Figure:
    columns = max(len(run.gate_labels) for group in groups for run in group.runs)
    size = (max(columns * PANEL[0] * 0.62, 4.2), len(groups) * PANEL[1] * 0.85 + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(groups), columns, squeeze=False)
    for line, group in zip(axes, groups):
        runs, labels = group.runs, group.first.gate_labels
        for panel, label in zip(line, labels):
            shares = [[100 * record["train"].get(f"gate/{label}", np.nan) for record in run.records] for run in runs]
            if is_one_epoch(runs):
                run_dots(panel, runs, [of_run[0] for of_run in shares], styles, digits=".0f")
            else:
                for run, of_run in zip(runs, shares):
                    run_line(panel, run, of_run, styles)
                whole_epochs(panel, max(run.epochs for run in runs))
            panel.set(title=label, ylim=(-3, 103), yticks=(0, 50, 100))
            panel.tick_params(labelleft=panel is line[0])
        for empty in line[len(labels) :]:
            empty.remove()
        words = [group.first.pair, group.first.distiller, *group.variant.split(), "distilled (%)"]
        line[0].set_ylabel("\n".join(words), fontsize=8)
    shown = [run for group in groups for run in group.runs]
    if not is_one_epoch(shown):
        figure.supxlabel("epoch", fontsize=9)
    unfinished = [unfinished_mark()] * any(run.status != "finished" for run in shown)
    figure_legend(figure, [*selection_marks(shown), *unfinished, *seed_marks(shown, styles)])
    return figure


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
        figure = Figure(figsize=(0.85 * spots + 1.8 + label_width(names), height), layout="constrained")
        panel = figure.subplots()
        shares = 100 * gates.shares[order]
        image = panel.imshow(shares, aspect="auto", cmap=SHARE_MAP, vmin=0, vmax=100, interpolation="nearest")
        if count <= ANNOTATED_CLASSES:
            _write_shares(panel, shares)
        every = -(-count // LABELLED_CLASSES)
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


def _write_shares(panel, shares: np.ndarray) -> None:
    for (y, x), share in np.ndenumerate(shares):
        if not np.isnan(share):
            ink = "black" if share > 55 else "white"
            panel.text(x, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7)
