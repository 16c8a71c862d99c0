"""Shares of classes as colours: what a student takes each class for, and where a policy distils it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure

from utils.report.style import SHARE_MAP, figure_title, label_width, styled

WRITTEN_CONFUSIONS, WRITTEN_SHARES = 20, 40  # classes up to which every cell shows its number
NAMED_CONFUSIONS, NAMED_SHARES = 40, 60  # classes that are named


@styled()
def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Share of each true class (row) that is predicted as each class (column), as colour; counts of images as numbers.

    Args:
        confusion: counts ``[C, C]``.
    """
    count, totals = len(confusion), confusion.sum(axis=1)
    every = -(-count // NAMED_CONFUSIONS)
    true = [f"{name} ({total:,})" for name, total in zip(class_names, totals)][::every]
    side, margin = min(max(0.42 * count, 2.6), 9), label_width(true)
    texts = np.where(confusion > 0, confusion.astype(int).astype(str), "") if count <= WRITTEN_CONFUSIONS else None
    figure, panel = _heatmap(
        (side + 1.3 + margin, side + 0.7 + margin),
        100 * confusion / np.maximum(totals, 1)[:, None],
        texts,
        # On an even scale the few per cent that go astray would look like none.
        PowerNorm(0.5, vmin=0, vmax=100),
        "share of the true class (%), square-root scale",
        f"Confusion of {title} on the validation images",
    )
    panel.set_xticks(range(0, count, every), class_names[::every], rotation=90, fontsize=7)
    panel.set_yticks(range(0, count, every), true, fontsize=7)
    thinned = f" (1 in {every} named)" * (every > 1)
    panel.set(xlabel=f"predicted class{thinned}", ylabel=f"true class (number of images){thinned}")
    return figure


@styled()
def class_heatmap(gates: pd.DataFrame, class_names: Sequence[str] | None, title: str) -> Figure:
    """Share of each class's samples distilled at each spot in one epoch; classes sorted by their mean share.

    Args:
        gates: see `Run.gate_shares`.
        class_names: None numbers the classes.
    """
    count, spots = gates.shape
    order = np.argsort(-np.nan_to_num(gates.to_numpy().mean(axis=1), nan=-1), kind="stable")
    names = [class_names[k] if class_names else str(k) for k in order]
    every = -(-count // NAMED_SHARES)
    shares = 100 * gates.to_numpy()[order]
    texts = np.where(np.isnan(shares), "", np.char.mod("%.0f", shares)) if count <= WRITTEN_SHARES else None
    height = 1.3 + (0.22 * count if count <= NAMED_SHARES else 10)
    size = (0.85 * spots + 1.8 + label_width(names), height)
    figure, panel = _heatmap(size, shares, texts, Normalize(0, 100), "samples distilled (%)", title)
    panel.set_aspect("auto")
    panel.set_yticks(range(0, count, every), names[::every], fontsize=7)
    panel.set_xticks(range(spots), gates.columns)
    panel.xaxis.tick_top()
    panel.spines[:].set_visible(False)
    thinned = f"; 1 in {every} named" * (every > 1)
    panel.set(xlabel=f"epoch {gates.attrs['epoch']}", ylabel=f"class (sorted by mean share{thinned})")
    return figure


def _heatmap(
    size: tuple[float, float], shares: np.ndarray, texts: np.ndarray | None, scale: Normalize, label: str, title: str
) -> tuple[Figure, Axes]:
    """Shares in percent as colours, each with its text; no texts where they would not fit into the cells."""
    figure = Figure(figsize=size, layout="constrained")
    panel = figure.subplots()
    image = panel.imshow(shares, cmap=SHARE_MAP, norm=scale, interpolation="nearest")
    for (y, x), text in np.ndenumerate(texts if texts is not None else ()):
        if text:
            ink = "black" if scale(shares[y, x]) > 0.55 else "white"
            panel.text(x, y, text, ha="center", va="center", color=ink, fontsize=7)
    panel.grid(visible=False)
    panel.tick_params(length=0)
    figure.colorbar(image, label=label, shrink=0.6, aspect=25)
    figure_title(figure, title)
    return figure, panel
