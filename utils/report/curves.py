"""Accuracy and losses over epochs, and what spot-adaptivity gains."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from utils.report.statistics import Difference
from utils.report.style import (
    PANELS_PER_FIGURE,
    REFERENCE,
    SELECTION_COLORS,
    chunks,
    figure_legend,
    log_scale,
    mark,
    panels,
    spot_colors,
    styled,
    unfinished_mark,
    whole_epochs,
)
from utils.report.tables import Measure, Row
from utils.run_folder.read import Run

ROWS_PER_FOREST = 40
LONG = 20  # epochs; curves of longer runs are cut off below where they are after ...
CUT_OFF = 0.25  # ... this part

_ORDER = ("single", "fixed", "random", "anti", "adaptive")  # from the bottom to the top


def by_panel(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that belong in one panel: one data set, pair and distiller; a network alone has a panel of its own."""
    groups: dict[tuple[str, str, str], list[Run]] = defaultdict(list)
    for run in runs:
        if run.records:
            groups[run.dataset, run.pair, run.distiller].append(run)
    return list(groups.values())


def accuracy_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Validation accuracy over epochs; the student alone in grey and the teacher's accuracy as a dotted line."""
    for groups in chunks(by_panel(runs), PANELS_PER_FIGURE):
        with styled():
            figure, axes = panels(len(groups))
            for panel, group in zip(axes, groups):
                _accuracy_panel(panel, [*_alone(group[0], runs), *group])
                _label(panel, group, "validation top-1 (%)")
            figure_legend(figure, _legend([run for group in groups for run in [*group, *_alone(group[0], runs)]]))
        yield figure


def cross_entropy_figures(runs: Sequence[Run]) -> Iterator[Figure]:
    """Cross-entropy over epochs: validation as a line, training dotted."""
    for groups in chunks(by_panel(runs), PANELS_PER_FIGURE):
        with styled():
            figure, axes = panels(len(groups))
            for panel, group in zip(axes, groups):
                for run in group:
                    _curve(panel, run, [record["val"]["loss/total"] for record in run.records], len(group))
                    _curve(panel, run, [train_ce(record) for record in run.records], len(group), linestyle=":")
                log_scale(panel)
                _label(panel, group, "cross-entropy (nats)")
            shown = [run for group in groups for run in group]
            figure_legend(figure, [*selection_marks(shown), mark("validation"), mark("training", ls=":")])
        yield figure


def train_ce(record: dict) -> float:
    """Mean cross-entropy on the training images; a network alone has no other loss."""
    return record["train"].get("loss/ce", record["train"]["loss/total"])


def loss_figure(run: Run) -> Figure:
    """Every term of one distilled run's training loss, before its weight."""
    spots = run.gate_labels
    terms = {"total (weighted)": ("loss/total", REFERENCE), "cross-entropy": ("loss/ce", SELECTION_COLORS["fixed"])}
    colors = spot_colors(spots)
    terms |= {f"distiller at {spot}": (f"loss/{spot}", color) for spot, color in zip(spots[:-1], colors)}
    terms["KL at the logits"] = ("loss/kl", colors[-1])
    terms["loss at the logits"] = ("loss/logits", colors[-1])  # another in the place of KL
    terms["cross-entropy, routed"] = ("loss/routed_ce", SELECTION_COLORS["anti"])
    with styled():
        figure, (panel,) = panels(1)
        for label, (key, color) in terms.items():
            points = [(r["epoch"], r["train"][key]) for r in run.records if r["train"].get(key, 0) > 0]
            if points:
                panel.plot(*zip(*points), color=color, label=label, marker="o" if len(points) == 1 else "")
        log_scale(panel)
        panel.set(title=run.title, xlabel="epoch", ylabel="training loss, epoch mean")
        whole_epochs(panel, run.epochs)
        panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


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


def _accuracy_panel(panel: Axes, runs: Sequence[Run]) -> None:
    for run in runs:
        _curve(panel, run, [record["val"]["top1"] for record in run.records], len(runs))
    teachers = [run.teacher_top1 for run in runs if run.teacher_top1 is not None]
    if teachers:
        panel.axhline(fmean(teachers), color=REFERENCE, ls=":", lw=1)
    # The steep start would leave no room for the differences that matter.
    late = [r["val"]["top1"] for run in runs for r in run.records if r["epoch"] >= run.epochs * CUT_OFF]
    if late and max(run.epochs for run in runs) >= LONG:
        panel.set_ylim(bottom=min(late) - 0.05 * (max(late) - min(late)))


def _label(panel: Axes, group: Sequence[Run], ylabel: str) -> None:
    first = group[0]
    panel.set(title=f"{first.pair}, {first.distiller}", xlabel="epoch")
    if panel.get_subplotspec().is_first_col():
        panel.set_ylabel(ylabel)
    whole_epochs(panel, max(run.epochs for run in group))


def _curve(panel: Axes, run: Run, values: Sequence[float], crowd: int, linestyle: str = "-") -> None:
    color = SELECTION_COLORS[run.selection]
    epochs = [record["epoch"] for record in run.records]
    width = 1.4 if crowd <= 8 else 0.9
    if run.selection == "fixed":  # shows on both sides of an adaptive line that it coincides with
        width *= 2
    panel.plot(
        epochs,
        values,
        color=color,
        lw=width,
        ls=linestyle,
        alpha=0.85,
        zorder=_ORDER.index(run.selection) + 2,
        marker="." if len(epochs) == 1 else "",
    )
    if run.status != "finished":
        panel.plot(epochs[-1], values[-1], "o", ms=5, mfc="white", color=color)


def _alone(run: Run, runs: Sequence[Run]) -> list[Run]:
    """The student's own trainings, of the same length."""
    if run.is_single:
        return []
    same = (run.dataset, run.student, run.epochs)
    return [one for one in runs if one.is_single and one.records and (one.dataset, one.student, one.epochs) == same]


def _legend(runs: Sequence[Run]) -> list[Line2D]:
    """Entries for what is in the panels of `runs`."""
    handles = selection_marks(runs)
    if any(run.teacher_top1 is not None for run in runs):
        handles.append(mark("teacher", ls=":"))
    if any(run.status != "finished" for run in runs):
        handles.append(unfinished_mark())
    return handles


def selection_marks(runs: Sequence[Run]) -> list[Line2D]:
    present = {run.selection for run in runs}
    return [mark(name, color) for name, color in SELECTION_COLORS.items() if name in present]
