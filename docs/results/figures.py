"""The figures of docs/results.md."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from experiments import CHOICES, DASHES, DISTILLERS, SELECTIONS, TEACHERS, UNDECIDED, WHOLE, WIDE, alone
from matplotlib.figure import Figure
from matplotlib.ticker import MultipleLocator
from result_lines import Lines, Shares, last, where

from utils.report.style import SELECTION_COLORS, figure_legend, mark, styled
from utils.run_folder.read import SINGLE

COLORS = SELECTION_COLORS | {"homo: false": "#000000"}


def accuracy_figure(lines: Lines) -> Figure:
    """Every seed of every selection as a dot and their mean as a bar, a panel for each teacher."""
    teachers = {root: title for root, title in TEACHERS.items() if where(lines, root=root)}
    with styled():
        figure = Figure(figsize=(8.4, 5.8), layout="constrained")
        axes = figure.subplots(2, -(-len(teachers) // 2), sharex=True, sharey=True, squeeze=False)
        for panel, (root, title) in zip(axes.flat, teachers.items()):
            panel.axvline(fmean(alone(lines).values()), color=SELECTION_COLORS[SINGLE], lw=1, ls="--")
            for row, distiller in enumerate(DISTILLERS):
                shown = {name: last(lines, root=root, distiller=distiller, selection=name) for name in SELECTIONS}
                shown["homo: false"] = last(lines, root=root + UNDECIDED, distiller=distiller, selection="adaptive")
                for place, (name, values) in enumerate(shown.items()):
                    if values:
                        height, color = row + 0.16 * (place - 2), COLORS[name]
                        panel.plot(list(values.values()), [height] * len(values), "o", ms=3.5, color=color, alpha=0.5)
                        panel.plot(fmean(values.values()), height, "|", ms=9, mew=2, color=color)
            panel.set_yticks(range(len(DISTILLERS)), list(DISTILLERS.values()))
            panel.set_ylim(len(DISTILLERS) - 0.5, -0.5)
            panel.grid(axis="y", visible=False)
            panel.set(title=f"teacher: {title}")
        for panel in axes[-1]:
            panel.xaxis.set_major_locator(MultipleLocator(5))
            panel.set_xlabel("top-1 on the test images, last epoch (%)")
        handles = [mark(name, COLORS[name], marker="o", ls="", ms=4) for name in (*SELECTIONS, "homo: false")]
        figure_legend(figure, [*handles, mark("student alone, mean", SELECTION_COLORS[SINGLE], ls="--", lw=1)])
    return figure


def share_figure(shares: Sequence[Shares]) -> Figure:
    """Share of samples distilled at each spot under AT, by epoch: a colour for each teacher, dashes without homo."""
    entries = [entry for entry in shares if (entry.distiller, entry.selection) == ("at", "adaptive")]
    colors = dict(zip(CHOICES, COLORS.values()))
    colors[WHOLE] = colors["run/long"]
    styles = {root + variant: (color, dash) for root, color in colors.items() for variant, dash in DASHES.items()}
    styles |= {root: (colors[root], DASHES[UNDECIDED]) for root in WIDE}
    spots = list(dict.fromkeys(entry.spot for entry in entries if entry.root in styles))
    with styled():
        figure = Figure(figsize=(9, 3), layout="constrained")
        axes = figure.subplots(1, len(spots), sharey=True, squeeze=False)[0]
        for panel, spot in zip(axes, spots):
            for entry in entries:
                if entry.spot == spot and entry.root in styles:
                    color, dash = styles[entry.root]
                    panel.plot(*zip(*entry.by_epoch.items()), color=color, ls=dash, lw=1.1, alpha=0.8)
            panel.set(title=spot, ylim=(-3, 103), yticks=(0, 50, 100), xlabel="epoch", xscale="log")
            panel.set_xticks((1, 3, 10, 30, 100), ("1", "3", "10", "30", "100"))
        axes[0].set_ylabel("distilled (%)")
        handles = [mark(f"teacher: {title}", colors[root]) for root, title in CHOICES.items()]
        handles += [mark("homo: true", ls=DASHES[""]), mark("homo: false", ls=DASHES[UNDECIDED])]
        figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure
