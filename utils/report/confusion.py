"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from utils.report.style import SHARE_MAP, label_width, styled

WRITTEN = 20  # classes up to which every cell shows its count
LABELLED = 40


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Share of each true class (row) that is predicted as each class (column), as colour; counts of images as numbers.

    Args:
        confusion: counts ``[C, C]``.
    """
    count = len(confusion)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    every = -(-count // LABELLED)
    true = [f"{name} ({total:,})" for name, total in zip(class_names, confusion.sum(axis=1))][::every]
    side, margin = min(max(0.42 * count, 2.6), 9), label_width(true)
    with styled():
        figure = Figure(figsize=(side + 1.3 + margin, side + 0.7 + margin), layout="constrained")
        panel = figure.subplots()
        # On an even scale the few per cent that go astray would look like none.
        scale = PowerNorm(0.5, vmin=0, vmax=100)
        image = panel.imshow(shares, cmap=SHARE_MAP, norm=scale, interpolation="nearest")
        if count <= WRITTEN:
            for (y, x), share in np.ndenumerate(shares):
                if confusion[y, x]:
                    ink = "black" if share > 30 else "white"
                    panel.text(x, y, f"{confusion[y, x]:.0f}", ha="center", va="center", color=ink, fontsize=7)
        panel.set_xticks(range(0, count, every), class_names[::every], rotation=90, fontsize=7)
        panel.set_yticks(range(0, count, every), true, fontsize=7)
        panel.grid(visible=False)
        panel.tick_params(length=0)
        thinned = "" if every == 1 else f" (1 in {every} named)"
        panel.set(xlabel=f"predicted class{thinned}", ylabel=f"true class (number of images){thinned}")
        figure.colorbar(image, label="share of the true class (%), square-root scale", shrink=0.7, aspect=25)
        figure.suptitle(f"Confusion of {title} on the validation images", x=0.01, ha="left", fontsize=9)
    return figure
