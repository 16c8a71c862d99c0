"""Accuracy and cross-entropy over epochs, and what spot-adaptivity gains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.report.settings import Group, alone, grouped
from utils.report.statistics import Difference
from utils.report.style import (
    PANELS_PER_FIGURE,
    REFERENCE,
    SELECTION_COLORS,
    SeedStyles,
    chunks,
    figure_legend,
    is_one_epoch,
    log_scale,
    mark,
    panels,
    run_dots,
    run_line,
    seed_marks,
    seed_styles,
    selection_marks,
    styled,
    unfinished_mark,
    whole_epochs,
)
from utils.report.tables import Measure, Row
from utils.run_folder.read import Run

ROWS_PER_FOREST = 40
TITLE_WIDTH = 46  # characters that fit above a panel
LONG = 20  # epochs; curves of longer runs are cut off below where they are after ...
CUT_OFF = 0.25  # ... this part


def by_panel(runs: Sequence[Run]) -> list[Group]:
    """Runs that belong in one panel, which are those of a row of the tables, or a network alone."""
    with_epochs = (Group([run for run in group.runs if run.records], group.variant) for group in grouped(runs))
    return [group for group in with_epochs if group.runs]


def accuracy_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Validation accuracy over epochs, all panels on one scale; the teacher's accuracy as a dotted line.

    Args:
        runs: of one data set.
    """
    limits, styles = _accuracy_limits(runs), seed_styles(runs)
    for groups in chunks(by_panel(runs), PANELS_PER_FIGURE):
        with styled():
            figure, axes = panels(len(groups))
            shown = []
            for panel, group in zip(axes, groups):
                members = [*(run for run in alone(group.first, runs) if run.records), *group.runs]
                shown += members
                top1 = [[record["val"]["top1"] for record in run.records] for run in members]
                _curves(panel, members, top1, styles)
                if teachers := [run.teacher_top1 for run in members if run.teacher_top1 is not None]:
                    panel.axhline(fmean(teachers), color=REFERENCE, ls=":", lw=1)
                panel.set_ylim(limits)
                _label(panel, group, "validation top-1 (%)")
            figure_legend(figure, _legend(shown, styles))
        yield figure


def cross_entropy_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Cross-entropy over epochs: validation, and training pale."""
    styles = seed_styles(runs)
    for groups in chunks(by_panel(runs), PANELS_PER_FIGURE):
        with styled():
            figure, axes = panels(len(groups))
            for panel, group in zip(axes, groups):
                validation = [[record["val"]["loss/total"] for record in run.records] for run in group.runs]
                training = [[train_ce(record) for record in run.records] for run in group.runs]
                _curves(panel, group.runs, training, styles, pale=True)
                _curves(panel, group.runs, validation, styles)
                panel.margins(y=0.1)
                if not is_one_epoch(group.runs):
                    log_scale(panel)
                _label(panel, group, "cross-entropy (nats)")
            shown = [run for group in groups for run in group.runs]
            dot = {"marker": "o", "ms": 5, "ls": ""} if is_one_epoch(shown) else {}
            kinds = [mark("validation", **dot), mark("training", mfc="none", alpha=0.4, **dot)]
            figure_legend(figure, [*selection_marks(shown), *kinds, *seed_marks(shown, styles)])
        yield figure


def train_ce(record: dict) -> float:
    """Mean cross-entropy on the training images; a network alone has no other loss."""
    return record["train"].get("loss/ce", record["train"]["loss/total"])


def difference_figures(rows: Sequence[Row], measure: Measure) -> Iterator[Figure]:
    """adaptive - fixed of every row that has it, with its interval, the published difference beside it."""
    known = [row for row in rows if row.difference(measure)]
    for piece in chunks(known, ROWS_PER_FOREST):
        with styled():
            yield _forest(piece, measure)


def _forest(rows: Sequence[Row], measure: Measure) -> Figure:
    figure = Figure(figsize=(7.2, 0.24 * len(rows) + 1.3), layout="constrained")
    panel = figure.subplots()
    differences = [row.difference(measure) for row in rows]
    for height, (row, difference) in enumerate(zip(rows, differences)):
        bars = {} if difference.half_width is None else {"xerr": difference.half_width, "capsize": 2}
        panel.errorbar(difference.mean, height, fmt="o", ms=4, color=SELECTION_COLORS["adaptive"], **bars)
        if row.published.difference is not None:
            panel.plot(row.published.difference, height, "D", ms=4, mfc="none", color=SELECTION_COLORS["fixed"])
    panel.axvline(0, color=REFERENCE, lw=0.8)
    panel.set_yticks(range(len(rows)), [f"{row.label} (n {d.n})" for row, d in zip(rows, differences)])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_xlim(*_forest_limits(rows, differences))
    panel.grid(axis="y", visible=False)
    panel.set_xlabel("adaptive - fixed, validation top-1 (percentage points)")
    handles = [mark("ours, 95 % interval", SELECTION_COLORS["adaptive"], marker="o", ms=4)]
    if any(row.published.difference is not None for row in rows):
        handles.append(mark("published", SELECTION_COLORS["fixed"], marker="D", ms=4, mfc="none", ls=""))
    figure_legend(figure, handles)
    return figure


def _forest_limits(rows: Sequence[Row], differences: Sequence[Difference]) -> tuple[float, float]:
    """Room for every mean, and for the intervals of three seeds or more: one of two may be ten times as wide."""
    reach = [0.5, *(abs(d.mean) for d in differences)]
    reach += [abs(row.published.difference or 0) for row in rows]
    enough = [d for d in differences if d.half_width is not None and d.n > 2] or [
        d for d in differences if d.half_width
    ]
    reach += [abs(d.mean) + d.half_width for d in enough]
    return -1.1 * max(reach), 1.1 * max(reach)


def _accuracy_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """One scale for all panels. The steep start would leave no room for the differences that matter."""
    values = [
        record["val"]["top1"]
        for run in runs
        for record in run.records
        if run.epochs < LONG or record["epoch"] >= run.epochs * CUT_OFF
    ] or [record["val"]["top1"] for run in runs for record in run.records]
    values += [run.teacher_top1 for run in runs if run.teacher_top1 is not None]
    low, high = min(values, default=0.0), max(values, default=100.0)
    margin = max(0.06 * (high - low), 0.5)
    return max(low - margin, -2), min(high + margin, 102)


def _curves(
    panel: Axes, runs: Sequence[Run], values: Sequence[Sequence[float]], styles: SeedStyles, *, pale: bool = False
) -> None:
    if is_one_epoch(runs):
        run_dots(panel, runs, [of_run[0] for of_run in values], styles, hollow=pale)
        return
    for run, of_run in zip(runs, values):
        run_line(panel, run, of_run, styles, width=1.4 if len(runs) <= 8 else 0.9, pale=pale)


def _label(panel: Axes, group: Group, ylabel: str) -> None:
    panel.set_title(fill(group.title, TITLE_WIDTH))
    if panel.get_subplotspec().is_first_col():
        panel.set_ylabel(ylabel)
    if not is_one_epoch(group.runs):
        panel.set_xlabel("epoch")
        whole_epochs(panel, max(run.epochs for run in group.runs))


def _legend(runs: Sequence[Run], styles: SeedStyles) -> list[Line2D]:
    """Entries for what is in the panels of `runs`."""
    handles = selection_marks(runs)
    if any(run.teacher_top1 is not None for run in runs):
        handles.append(mark("teacher", ls=":"))
    if any(run.status != "finished" for run in runs):
        handles.append(unfinished_mark())
    return handles + seed_marks(runs, styles)
