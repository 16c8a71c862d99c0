"""Accuracy and cross-entropy over epochs, and what spot-adaptivity gains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from textwrap import fill

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.report.groups import Group
from utils.report.style import (
    PANELS_PER_FIGURE,
    REFERENCE,
    SELECTION_COLORS,
    chunks,
    epoch_axis,
    figure_legend,
    legend,
    log_axis,
    mark,
    panels,
    run_line,
    styled,
)
from utils.run_folder.read import Run

ROWS_PER_FOREST = 40
TITLE_WIDTH = 46  # characters that fit above a panel
STEEP = 0.25  # of the epochs, in which no scale is sought: accuracy rises too far there


def accuracy_figures(groups: Sequence[Group]) -> Iterator[Figure]:
    """Validation accuracy over epochs, all panels on one scale; the teacher's accuracy as a dotted line.

    Args:
        groups: of one data set.
    """
    limits = _accuracy_limits([run for group in groups for run in group.runs])

    def draw(panel: Axes, group: Group) -> list[Run]:
        shown = with_epochs([*group.alone, *group.runs])
        for run in shown:
            run_line(panel, run, run.curve("val.top1"))
        if (teacher := pd.Series([run.teacher_top1 for run in shown], dtype=float).mean()) > 0:
            panel.axhline(teacher, color=REFERENCE, ls=":", lw=1)
        panel.set_ylim(limits)
        return shown

    yield from _figures(groups, draw, "validation top-1 (%)", [mark("teacher", ls=":")])


def cross_entropy_figures(groups: Sequence[Group]) -> Iterator[Figure]:
    """Cross-entropy over epochs: validation, and training pale."""

    def draw(panel: Axes, group: Group) -> list[Run]:
        shown = with_epochs(group.runs)
        for run in shown:
            # A network alone has no other loss than the cross-entropy.
            run_line(panel, run, run.curve("train.loss/ce").fillna(run.curve("train.loss/total")), pale=True)
            run_line(panel, run, run.curve("val.loss/total"))
        log_axis(panel)
        return shown

    kinds = [mark("validation"), mark("training", alpha=0.4, lw=0.7)]
    yield from _figures(groups, draw, "cross-entropy (nats)", kinds)


def with_epochs(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.records]


def _figures(
    groups: Sequence[Group], draw: Callable[[Axes, Group], list[Run]], ylabel: str, entries: Sequence[Line2D]
) -> Iterator[Figure]:
    """Panels of twelve groups at a time; `draw` draws one of them and tells which runs it shows."""
    for piece in chunks([group for group in groups if with_epochs(group.runs)], PANELS_PER_FIGURE):
        with styled():
            figure, axes = panels(len(piece))
            shown = []
            for panel, group in zip(axes, piece):
                shown += draw(panel, group)
                panel.set_title(fill(group.title, TITLE_WIDTH))
                epoch_axis(panel, max(run.epochs for run in group.runs))
                if panel.get_subplotspec().is_first_col():
                    panel.set_ylabel(ylabel)
            legend(figure, shown, entries)
        yield figure


def _accuracy_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """One scale for all panels. The steep start would leave no room for the differences that matter."""
    curves = [(run, run.curve("val.top1")) for run in with_epochs(runs)]
    late = [curve[curve.index >= STEEP * run.epochs] for run, curve in curves]
    late = late if any(map(len, late)) else [curve for _, curve in curves]
    values = pd.concat([*late, pd.Series([run.teacher_top1 for run in runs], dtype=float)]).dropna()
    low, high = (values.min(), values.max()) if len(values) else (0.0, 100.0)
    margin = max(0.06 * (high - low), 0.5)
    return max(low - margin, -2), min(high + margin, 102)


def difference_figures(groups: Sequence[Group], measure: str = "last") -> Iterator[Figure]:
    """adaptive - fixed of every group that has it, with its interval, the published difference beside it."""
    known = [group for group in groups if group.difference("adaptive", "fixed", measure)]
    for piece in chunks(known, ROWS_PER_FOREST):
        with styled():
            yield _forest(piece, measure)


def _forest(groups: Sequence[Group], measure: str) -> Figure:
    differences = [group.difference("adaptive", "fixed", measure) for group in groups]
    paper = pd.Series([g.published.get("adaptive", float("nan")) - g.published.get("fixed", 0) for g in groups])
    table = pd.DataFrame([(d.mean, d.half_width, d.n) for d in differences], columns=["mean", "half", "n"], dtype=float)
    figure = Figure(figsize=(7.2, 0.24 * len(groups) + 1.3), layout="constrained")
    panel = figure.subplots()
    ours, theirs = SELECTION_COLORS["adaptive"], SELECTION_COLORS["fixed"]
    panel.errorbar(table["mean"], table.index, xerr=table["half"].fillna(0), fmt="o", ms=4, capsize=2, color=ours)
    panel.plot(paper, paper.index, "D", ms=4, mfc="none", color=theirs)
    panel.axvline(0, color=REFERENCE, lw=0.8)
    panel.set_yticks(table.index, [f"{group.title} (n {d.n})" for group, d in zip(groups, differences)])
    panel.set_ylim(len(groups) - 0.5, -0.5)
    # An interval of two seeds may be ten times as wide as one of three, so it may leave the frame.
    reach = [
        0.5,
        table["mean"].abs().max(),
        paper.abs().max(),
        (table["mean"].abs() + table["half"])[table["n"] > 2].max(),
    ]
    panel.set_xlim(-1.1 * pd.Series(reach).max(), 1.1 * pd.Series(reach).max())
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("adaptive - fixed, validation top-1 (percentage points)")
    published = [mark("published", theirs, marker="D", ms=4, mfc="none", ls="")] if paper.notna().any() else []
    figure_legend(figure, [mark("ours, 95 % interval", ours, marker="o", ms=4), *published])
    return figure
