"""What the runs on one data set amount to: the best student, what it gains, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import fill

import pandas as pd
from matplotlib.figure import Figure

from utils.report.groups import TEACHER, Group
from utils.report.statistics import Difference, mean_text
from utils.report.style import REFERENCE, SELECTION_COLORS, figure_legend, mark, panels, styled
from utils.run_folder.layout import Layout
from utils.run_folder.read import SELECTIONS, SINGLE, Run
from utils.run_folder.records import read_evaluation

LATENCY, ARITHMETIC = "latency of one image (ms)", "forward pass of one image (MFLOPs)"
COSTS = (LATENCY, ARITHMETIC)
POINT = ["cost", "mean", "std", "kind", "label"]
LABEL_WIDTH = 30  # characters


def best_student(groups: Sequence[Group]) -> tuple[Group, str] | None:
    """The distilled group and its selection with the highest mean accuracy after the last epoch."""
    known = [(group, selection) for group in groups for selection in SELECTIONS if len(group.top1(selection))]
    return max(known, key=lambda one: one[0].top1(one[1]).mean(), default=None)


def answer(groups: Sequence[Group]) -> list[str]:
    """The best student in a sentence or two; none without a finished one."""
    best = best_student(groups)
    if best is None:
        return []
    group, selection = best
    sentence = f"Best student: {group.title}, {selection}, {mean_text(group.top1(selection))}"
    if gain := group.difference(selection, SINGLE):
        sentence += f", over the student alone {_judged(gain)}"
    if selection != "fixed" and (gain := group.difference(selection, "fixed")):
        sentence += f"; {selection} instead of fixed adds {_judged(gain)}"
    elif selection == "fixed" and (gain := group.difference("adaptive", "fixed")):
        sentence += f"; adaptive instead of fixed adds {_judged(gain)}"
    teacher = group.top1(TEACHER)
    return [sentence + (f". Its teacher has {teacher.mean():.2f}." if len(teacher) else ".")]


def _judged(difference: Difference) -> str:
    if difference.half_width is None:
        return f"{difference} (one seed, no interval)"
    return f"{difference}{'' if difference.is_significant else ', not significant'}"


def tradeoff_figures(groups: Sequence[Group]) -> Iterator[Figure]:
    """Mean accuracy after the last epoch against the cost of the network, with its deviation over the seeds.

    The cost is the latency that ``python -m utils.evaluate`` measured, if it did for all networks, else FLOPs.
    """
    best = best_student(groups)
    tables = {axis: pd.DataFrame(_points(groups, axis), columns=POINT).drop_duplicates() for axis in COSTS}
    axis = next((axis for axis, table in tables.items() if table["cost"].notna().all()), None)
    if axis is None or best is None:
        return
    group, selection = best
    top = (group.first.distiller, selection, group.top1(selection).mean())
    shown = tables[axis]
    colors = {TEACHER: REFERENCE} | SELECTION_COLORS
    with styled():
        figure, (panel,) = panels(1)
        labels: dict[tuple[int, int], list[tuple[str, tuple[float, float]]]] = {}
        for point in shown.itertuples():
            place, std = (point.cost, point.mean), 0.0 if pd.isna(point.std) else point.std
            panel.errorbar(*place, std, fmt="o", ms=4, lw=1, color=colors[point.kind], alpha=0.8)
            text = f"{top[0]}, {selection}" if (point.kind, point.mean) == top[1:] else point.label
            if text:
                labels.setdefault(_cell(shown, place), []).append((text, place))
        for texts in labels.values():  # those of points too close for two lines share one
            words = fill(", ".join(dict.fromkeys(text for text, _ in texts)), LABEL_WIDTH)
            panel.annotate(words, texts[0][1], (6, 0), textcoords="offset points", va="center", fontsize=7)
        kinds = [kind for kind in colors if kind in set(shown["kind"])]
        names = {SINGLE: "student alone"}
        dots = [mark(names.get(kind, kind), colors[kind], marker="o", ls="", ms=4) for kind in kinds]
        figure_legend(figure, dots)
        panel.margins(x=0.2)
        panel.set(xlabel=axis, ylabel="validation top-1 (%)")
        yield figure


def _cell(points: pd.DataFrame, place: tuple[float, float]) -> tuple[int, int]:
    """Where a point lies on a grid of 4 x 12 cells over all of them; there is room for one label in a cell."""
    cells = []
    for name, value, count in zip(("cost", "mean"), place, (4, 12)):
        low, high = points[name].min(), points[name].max()
        cells.append(round(count * (value - low) / (high - low)) if high > low else 0)
    return tuple(cells)


def _points(groups: Sequence[Group], axis: str) -> Iterator[tuple]:
    for group in groups:
        for kind in (TEACHER, SINGLE, *SELECTIONS):
            values, runs = group.top1(kind), [run for run in group.of(kind) or group.runs if run.is_finished]
            if len(values) and runs:
                label = {TEACHER: group.first.teacher, SINGLE: group.first.student}.get(kind, "")
                yield _cost(runs[-1], axis, kind == TEACHER), values.mean(), values.std(), kind, label


def _cost(run: Run, axis: str, of_teacher: bool) -> float | None:
    if axis == ARITHMETIC:
        flops = (run.facts or {}).get("teacher_flops" if of_teacher else "flops")
        return None if flops is None else flops / 1e6
    measured = read_evaluation(Layout(run.path).evaluation / "evaluation.json") or {}
    return measured.get(f"{run.teacher} (teacher)" if of_teacher else run.student)
