"""Which spots are distilled, and when."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from utils.report.groups import Group
from utils.report.style import PANEL, epoch_axis, legend, run_line, styled
from utils.run_folder.read import Run


def with_policy(runs: Sequence[Run]) -> list[Run]:
    """Those that have recorded what their policy did."""
    return [run for run in runs if run.has_policy and run.records]


@styled()
def share_figure(groups: Sequence[Group]) -> Figure:
    """Share of training samples distilled at each spot over epochs: a row for each group, a column for each spot.

    Args:
        groups: have runs `with_policy`.
    """
    rows = [with_policy(group.runs) for group in groups]
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
