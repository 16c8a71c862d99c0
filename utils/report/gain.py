"""What distillation gains on one data set: the best student, what it gains over training alone, and what it costs."""

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
from utils.run_folder.records import read_latencies

LATENCY, ARITHMETIC = "latency of one image (ms)", "forward pass of one image (MFLOPs)"
LABEL_WIDTH = 30  # characters


def best_student(groups: Sequence[Group], selections: Sequence[str] = SELECTIONS) -> tuple[Group, str] | None:
    """The distilled group and its selection with the highest mean accuracy after the last epoch.

    Args:
        selections: that may be it; with `SINGLE`, the student alone.
    """
    known = [(group, selection) for group in groups for selection in selections if len(group.top1(selection))]
    return max(known, key=lambda one: one[0].top1(one[1]).mean(), default=None)


def best_run(groups: Sequence[Group], selections: Sequence[str] = SELECTIONS) -> Run | None:
    """The best seed of the `best_student`."""
    best = best_student(groups, selections)
    finished = [run for run in best[0].of(best[1]) if run.is_finished] if best else []
    return max(finished, key=lambda run: run.last_top1, default=None)


def answer(groups: Sequence[Group]) -> list[str]:
    """The best student of the distilled `groups`, its gain and that of the policy, in a sentence; none without one."""
    best = best_student(groups)
    if best is None:
        return []
    group, selection = best
    sentence = f"Best student: {group.title}, {selection}, {mean_text(group.top1(selection))}"
    if over_alone := group.difference(selection, SINGLE):
        sentence += f", over the student alone {judged(over_alone)}"
        gains = (one.difference(which, SINGLE) for one in groups for which in SELECTIONS)
        if not any(gain and gain.mean > 0 for gain in gains):
            sentence = f"No distilled student is better than the student alone. {sentence}"
    other = "adaptive" if selection == "fixed" else selection
    if instead := group.difference(other, "fixed"):
        sentence += f"; {other} instead of fixed adds {judged(instead)}"
    teacher = group.top1(TEACHER)
    return [sentence + (f". Its teacher has {teacher.mean():.2f}." if len(teacher) else ".")]


def judged(difference: Difference) -> str:
    """The difference, and whether it is significant."""
    if difference.half_width is None:
        return f"{difference} (one seed, no interval)"
    return f"{difference}{'' if difference.is_significant else ', not significant'}"


@styled()
def tradeoff_figure(groups: Sequence[Group]) -> Figure | None:
    """Mean accuracy after the last epoch against the cost of the network, with its deviation over the seeds.

    The cost is the latency that ``python -m utils.evaluate`` measured, if it did in some run of each network, else
    FLOPs; there is no figure if neither is known of all.
    """
    points = pd.DataFrame(_points(groups))
    axis = next((axis for axis in (LATENCY, ARITHMETIC) if len(points) and points[axis].notna().all()), None)
    if axis is None:
        return None
    points = points.rename(columns={axis: "cost"})[["cost", "mean", "std", "kind", "label"]].drop_duplicates()
    colors = {TEACHER: REFERENCE} | SELECTION_COLORS
    figure, (panel,) = panels(1)
    for point in points.itertuples():
        std = 0.0 if pd.isna(point.std) else point.std
        panel.errorbar(point.cost, point.mean, std, fmt="o", ms=4, lw=1, color=colors[point.kind], alpha=0.8)
    # There is room for one label in each cell of a grid of 4 x 12 over all points; points of one cell share it.
    cell = [_rounded(points["cost"], 4), _rounded(points["mean"], 12)]
    for _, near in points[points["label"] != ""].groupby(cell, sort=False):
        words = fill(", ".join(near["label"].unique()), LABEL_WIDTH)
        place = near["cost"].iloc[0], near["mean"].iloc[0]
        panel.annotate(words, place, (6, 0), textcoords="offset points", va="center", fontsize=7)
    names = {SINGLE: "student alone"}
    shown = [kind for kind in colors if kind in set(points["kind"])]
    figure_legend(figure, [mark(names.get(kind, kind), colors[kind], marker="o", ls="", ms=4) for kind in shown])
    panel.margins(x=0.2)
    panel.set(xlabel=axis, ylabel="validation top-1 (%)")
    return figure


def _rounded(values: pd.Series, count: int) -> pd.Series:
    """Which of `count` + 1 equal steps from the lowest to the highest is closest."""
    return (count * (values - values.min()) / max(values.max() - values.min(), 1e-9)).round()


def _points(groups: Sequence[Group]) -> Iterator[dict[str, object]]:
    best = best_student(groups) or (None, None)
    latencies: dict[str, float] = {}
    for run in (run for group in groups for run in (*group.others, *group.runs)):
        latencies |= read_latencies(Layout(run.path).evaluation / "evaluation.json")
    for group in groups:
        for kind in (TEACHER, SINGLE, *SELECTIONS):
            values, runs = group.top1(kind), [run for run in group.of(kind) or group.runs if run.is_finished]
            if len(values) and runs:
                named = {TEACHER: group.first.teacher, SINGLE: group.first.student}
                if group is best[0]:
                    named[best[1]] = f"{group.first.distiller}, {best[1]}"
                network, key = runs[-1].student, "flops"
                if kind == TEACHER:
                    network, key = f"{runs[-1].teacher} (teacher)", "teacher_flops"
                flops = runs[-1].facts.get(key)
                yield {
                    LATENCY: latencies.get(network),
                    ARITHMETIC: flops and flops / 1e6,
                    "mean": values.mean(),
                    "std": values.std(),
                    "kind": kind,
                    "label": named.get(kind, ""),
                }
