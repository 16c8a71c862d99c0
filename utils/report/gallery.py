"""Images: those that a policy distils most, and least, often at each spot, and the worst mistakes of a student."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from datasets.source import Source, Split
from utils.errors import UserError
from utils.report.style import figure_title, styled

TILES = 8  # in a row
TILE = 64  # pixels
GAP = 4
STRIP = TILES * (TILE + GAP) - GAP
IMAGE_ROW, ALIKE_ROW, TEXT_LINE = 1.2, 0.3, 0.12  # inches
CHARACTERS = 12  # of a class name beside each other below an image


def extremes(frequency: np.ndarray, count: int, *, most: bool) -> np.ndarray:
    """Indices of the `count` samples distilled most (least) often, the most extreme first.

    Where many tie for the last places, those taken are spread evenly over the data set, which would else show
    nothing but its first class. A sample at the opposite extreme is never among them, so there may be fewer, and
    there are none if all samples are alike.

    Args:
        frequency: ``[N]``.
    """
    rank = -frequency if most else frequency
    order = np.argsort(rank, kind="stable")
    order = order[rank[order] < rank.max()]
    if len(order) <= count:
        return order
    limit = rank[order[count - 1]]
    sure, tied = order[rank[order] < limit], order[rank[order] == limit]
    missing = count - len(sure)
    return np.concatenate([sure, tied[np.arange(missing) * len(tied) // missing]])


@styled()
def gallery_figure(samples: pd.DataFrame, source: Source, title: str) -> Figure:
    """One row per spot: most often distilled on the left, least often on the right.

    Args:
        samples: see `Run.gate_samples`.
        source: its training images are those that were recorded.
    """
    columns = samples.to_numpy().T
    alike = [column.min() == column.max() for column in columns]
    lines = max(_wrapped(name).count("\n") for name in source.class_names)
    heights = [ALIKE_ROW if same else IMAGE_ROW + lines * TEXT_LINE for same in alike]
    figure = Figure(figsize=(2 * STRIP / 100 + 0.3, sum(heights) + 0.4), layout="constrained")
    axes = figure.subplots(len(alike), 2, squeeze=False, height_ratios=heights)
    for label, same, frequency, panels in zip(samples, alike, columns, axes):
        for most, panel in zip((True, False), panels):
            panel.set_axis_off()
            if not same:
                panel.set_title(f"{label}: {'most' if most else 'least'} often distilled")
                chosen = extremes(frequency, TILES, most=most)
                names = (_wrapped(source.class_names[source.train.labels[index]]) for index in chosen)
                captions = [f"{name}\n{100 * frequency[index]:.0f} %" for name, index in zip(names, chosen)]
                _strip(panel, source.train, chosen, captions)
        if same:
            panels[0].set_title(f"{label}: every image is distilled equally often ({100 * frequency[0]:.0f} %)")
    epochs = samples.attrs["epochs"]
    figure_title(figure, f"{title}, {epochs} epoch{'s' if epochs > 1 else ''}")
    return figure


@styled()
def mistakes_figure(mistakes: pd.DataFrame, split: Split, class_names: Sequence[str], title: str) -> Figure:
    """Images with their true class and the predicted one, eight in a row.

    Args:
        mistakes: see `utils.report.student.predict`; not empty.
        split: the images.
    """
    pairs = zip(mistakes["label"], mistakes["predicted"], 100 * mistakes["certainty"])
    captions = [f"{_wrapped(class_names[a])}\n→ {_wrapped(class_names[b])}\n{share:.0f} %" for a, b, share in pairs]
    rows = -(-len(captions) // TILES)
    height = IMAGE_ROW - 0.3 + TEXT_LINE * max(caption.count("\n") for caption in captions)
    figure = Figure(figsize=(STRIP / 100 + 0.3, rows * height + 0.4), layout="constrained")
    for row, panel in enumerate(figure.subplots(rows, squeeze=False).flat):
        shown = slice(row * TILES, (row + 1) * TILES)
        _strip(panel, split, mistakes.index[shown], captions[shown])
        panel.set_axis_off()
    figure_title(figure, title)
    return figure


def _strip(panel: Axes, split: Split, indices: Sequence[int], captions: Sequence[str]) -> None:
    """Images beside each other with their captions below; a blank where an image cannot be read any more."""
    canvas = np.full((TILE, STRIP, 3), 255, dtype=np.uint8)
    for position, (index, caption) in enumerate(zip(indices, captions)):
        left = position * (TILE + GAP)
        try:
            picture = split.picture(int(index)).convert("RGB")
            # Small images are shown as the pixels that they are.
            method = Image.Resampling.NEAREST if max(picture.size) < TILE else Image.Resampling.LANCZOS
            canvas[:, left : left + TILE] = np.asarray(ImageOps.fit(picture, (TILE, TILE), method))
        except UserError:  # it was there when the run began
            panel.text(left + TILE / 2, TILE / 2, "cannot\nbe read", ha="center", va="center", fontsize=7)
        panel.text(left + TILE / 2, TILE + 3, caption, ha="center", va="top", fontsize=7)
    panel.imshow(canvas, interpolation="nearest")


def _wrapped(name: str) -> str:
    """All of a class name, in lines that fit below an image."""
    spaced = name.replace("_", "_ ")  # where a line may end
    lines = textwrap.wrap(spaced, CHARACTERS) or [name]
    return "\n".join(line.replace("_ ", "_") for line in lines)
