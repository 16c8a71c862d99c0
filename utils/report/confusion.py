"""The confusion matrix as a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from utils.report.style import SHARE_MAP, shortened, styled

WRITTEN = 20  # classes up to which every cell shows its number
LABELLED = 40


def confusion_figure(confusion: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """Share of each true class (row) that is predicted as each class (column).

    Args:
        confusion: counts ``[C, C]``.
    """
    count = len(confusion)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = min(max(0.42 * count, 2.6), 9)
    with styled():
        figure = Figure(figsize=(side + 1.9, side + 1.1), layout="constrained")
        panel = figure.subplots()
        # On an even scale the few per cent that go astray would look like none.
        scale = PowerNorm(0.5, vmin=0, vmax=100)
        image = panel.imshow(shares, cmap=SHARE_MAP, norm=scale, interpolation="nearest")
        if count <= WRITTEN:
            for (y, x), share in np.ndenumerate(shares):
                if confusion[y, x]:
                    ink = "black" if share > 30 else "white"
                    panel.text(x, y, f"{share:.0f}", ha="center", va="center", color=ink, fontsize=7)
        every = -(-count // LABELLED)
        names = [shortened(name) for name in class_names[::every]]
        panel.set_xticks(range(0, count, every), names, rotation=90, fontsize=7)
        panel.set_yticks(range(0, count, every), names, fontsize=7)
        panel.grid(visible=False)
        panel.tick_params(length=0)
        thinned = "" if every == 1 else f" (1 in {every} named)"
        panel.set(xlabel=f"predicted class{thinned}", ylabel=f"true class{thinned}")
        figure.colorbar(image, label="share of the true class (%), square-root scale", shrink=0.7, aspect=25)
        figure.suptitle(f"Confusion of {title} on the validation images", x=0.01, ha="left", fontsize=9)
    return figure
