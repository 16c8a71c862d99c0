"""Accuracy, losses and gates over epochs."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from utils.report.groups import Group
from utils.report.style import (
    PANEL,
    REFERENCE,
    epoch_axis,
    legend,
    log_axis,
    mark,
    panels,
    run_line,
    styled,
)
from utils.run_folder.read import Run

TITLE_WIDTH = 46  # characters that fit above a panel, or beside one
_NOT_WEIGHTED = ("loss/total", "loss/ce", "loss/routed_ce", "loss/policy")
ROUTED = "routed cross-entropy,\nthe policy's, not in the total"
STEEP = 0.25  # of the epochs, in which no scale is sought: accuracy rises too far there


def with_epochs(runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if run.records]


def choosing(runs: Sequence[Run]) -> list[Run]:
    """The runs that have recorded what their policy did."""
    return [run for run in runs if run.has_policy and run.records]


@styled()
def accuracy_figure(groups: Sequence[Group], limits: tuple[float, float]) -> Figure:
    """Validation accuracy over epochs, a panel for each group; the teacher's accuracy as a dotted line.

    Args:
        groups: have runs with epochs.
        limits: of the y axis, see `accuracy_limits`.
    """
    figure, axes = _panels(groups, "validation top-1 (%)")
    shown = []
    for panel, group in zip(axes, groups):
        runs = with_epochs([*group.others, *group.runs])
        for run in runs:
            run_line(panel, run, run.curve("val.top1"))
        if (teacher := pd.Series([run.teacher_top1 for run in runs], dtype=float).mean()) > 0:
            panel.axhline(teacher, color=REFERENCE, ls=":", lw=1)
        panel.set_ylim(limits)
        shown += runs
    legend(figure, shown, [mark("teacher", ls=":")])
    return figure


@styled()
def cross_entropy_figure(groups: Sequence[Group]) -> Figure:
    """Cross-entropy over epochs: validation, and training pale."""
    figure, axes = _panels(groups, "cross-entropy (nats)")
    for panel, group in zip(axes, groups):
        for run in with_epochs(group.runs):
            # A network alone has no other loss than the cross-entropy.
            run_line(panel, run, run.curve("train.loss/ce").fillna(run.curve("train.loss/total")), pale=True)
            run_line(panel, run, run.curve("val.loss/total"))
        log_axis(panel)
    shown = [run for group in groups for run in with_epochs(group.runs)]
    legend(figure, shown, [mark("validation"), mark("training", alpha=0.4, lw=0.7)])
    return figure


def _panels(groups: Sequence[Group], ylabel: str) -> tuple[Figure, list[Axes]]:
    figure, axes = panels(len(groups))
    for panel, group in zip(axes, groups):
        panel.set_title(fill(group.title, TITLE_WIDTH))
        epoch_axis(panel, max(run.epochs for run in group.runs))
        if panel.get_subplotspec().is_first_col():
            panel.set_ylabel(ylabel)
    return figure, axes


def accuracy_limits(runs: Sequence[Run]) -> tuple[float, float]:
    """One scale for all panels. The steep start would leave no room for the differences that matter."""
    curves = [(run, run.curve("val.top1")) for run in with_epochs(runs)]
    late = [curve[curve.index >= STEEP * run.epochs] for run, curve in curves]
    late = late if any(map(len, late)) else [curve for _, curve in curves]
    values = pd.concat([*late, pd.Series([run.teacher_top1 for run in runs], dtype=float)]).dropna()
    low, high = (values.min(), values.max()) if len(values) else (0.0, 100.0)
    margin = max(0.06 * (high - low), 0.5)
    return max(low - margin, -2), min(high + margin, 102)


@styled()
def share_figure(groups: Sequence[Group]) -> Figure:
    """Share of training samples distilled at each spot over epochs: a row for each group, a column for each spot.

    Args:
        groups: have runs of `choosing`.
    """
    rows = [choosing(group.runs) for group in groups]
    columns = max(len(runs[0].gate_labels) for runs in rows)
    size = (max(columns * PANEL[0] * 0.62, 4.2), len(rows) * PANEL[1] * 0.85 + 0.7)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(rows), columns, squeeze=False, sharey="row")
    for line, group, runs in zip(axes, groups, rows):
        labels = runs[0].gate_labels
        for panel, label in zip(line, labels):
            for run in runs:
                run_line(panel, run, 100 * run.curve(f"train.gate/{label}"))
            epoch_axis(panel, max(run.epochs for run in runs))
            panel.set(title=label, ylim=(-3, 103), yticks=(0, 50, 100))
            panel.tick_params(labelleft=panel is line[0])
        for empty in line[len(labels) :]:
            empty.remove()
        words = [group.first.pair, group.first.distiller, *group.settings.split(), "distilled (%)"]
        line[0].set_ylabel("\n".join(words), fontsize=8)
    legend(figure, [run for runs in rows for run in runs])
    return figure


def contributions(run: Run) -> pd.DataFrame:
    """What every term of the loss adds to the total in each epoch, including its weights (alpha or beta, balance).

    The weights are those that the run wrote down; the terms of an older run, which did not, are without them.

    Returns:
        a column for each term by its name in ``metrics.jsonl``, e.g. ``"loss/f1"``; total and cross-entropy are first.
    """
    weights = run.facts.get("weights", {})
    named = [name for name in run.records[-1]["train"] if name.startswith("loss/") and name not in _NOT_WEIGHTED]
    terms = {name: run.curve(f"train.{name}").fillna(0.0) for name in ("loss/total", "loss/ce", *named)}
    for name in named:
        weight, ramp = weights.get(name, (1.0, 0))
        balance = run.curve(name.replace("loss/", "train.weight/", 1)).fillna(1.0)
        terms[name] *= balance * weight * np.minimum(1.0, terms[name].index / max(ramp, 1))
    return pd.DataFrame(terms)


@styled()
def loss_figure(run: Run) -> Figure:
    """The contributions over epochs."""
    terms, labels = contributions(run), {"ce": "cross-entropy", "kl": "alpha * KL at the logits"}
    labels |= {"logits": "alpha * loss at the logits"}
    labels |= {spot: f"beta * distiller at {spot}" for spot in run.gate_labels[:-1]}
    figure, (panel,) = panels(1)
    for name, values in terms.items():
        spot = name.removeprefix("loss/")
        marker = "o" if len(values) == 1 else ""
        color = REFERENCE if spot == "total" else None
        panel.plot(values, label=labels.get(spot, spot), color=color, marker=marker, ms=4)
    if (routed := run.curve("train.loss/routed_ce")).notna().any():
        panel.plot(routed, label=ROUTED, ls="--")
    if terms.min(axis=None) > 0:
        log_axis(panel)
    epoch_axis(panel, run.epochs)
    panel.set(title=run.title, ylabel="part of the training loss, epoch mean")
    panel.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure
