"""The training images that a policy distils most, and least, often at each spot."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from datasets.source import Source
from utils.errors import UserError
from utils.report.style import styled
from utils.run_folder.records import GateSamples

TILES = 8
TILE = 64  # pixels
GAP = 4
STRIP = TILES * (TILE + GAP) - GAP
IMAGE_ROW, ALIKE_ROW, TEXT_LINE = 1.2, 0.3, 0.12  # inches
WAITS_FOR = 10  # epochs; before, most shares are equal by chance
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


def gallery_figure(samples: GateSamples, source: Source, title: str) -> Figure:
    """One row per spot: most often distilled on the left, least often on the right.

    Args:
        source: its training images are those that were recorded.
    """
    spots = len(samples.gates)
    alike = [column.min() == column.max() for column in samples.frequency.T]
    lines = max(_wrapped(name).count("\n") for name in source.class_names)
    heights = [ALIKE_ROW if same else IMAGE_ROW + lines * TEXT_LINE for same in alike]
    with styled():
        figure = Figure(figsize=(2 * STRIP / 100 + 0.3, sum(heights) + 0.4), layout="constrained")
        axes = figure.subplots(spots, 2, squeeze=False, height_ratios=heights)
        for k, label in enumerate(samples.gates):
            for panel in axes[k]:
                panel.set_axis_off()
            if alike[k]:
                share = 100 * samples.frequency[0, k]
                axes[k, 0].set_title(f"{label}: every image is distilled equally often ({share:.0f} %)")
                continue
            for most, panel in zip((True, False), axes[k]):
                panel.set_title(f"{label}: {'most' if most else 'least'} often distilled")
                _strip(panel, samples.frequency[:, k], source, most=most)
        epochs = f"{samples.epochs} epoch{'s' if samples.epochs > 1 else ''}"
        figure.suptitle(f"{title}, {epochs}", x=0.01, ha="left", fontsize=9)
    return figure


def _strip(panel: Axes, frequency: np.ndarray, source: Source, *, most: bool) -> None:
    canvas = np.full((TILE, STRIP, 3), 255, dtype=np.uint8)
    for position, index in enumerate(extremes(frequency, TILES, most=most)):
        left = position * (TILE + GAP)
        name = source.class_names[int(source.train.labels[index])]
        try:
            canvas[:, left : left + TILE] = tile(source.train.picture(int(index)))
        except UserError:  # it was there when the run began
            panel.text(left + TILE / 2, TILE / 2, "cannot\nbe read", ha="center", va="center", fontsize=7)
        text = f"{_wrapped(name)}\n{100 * frequency[index]:.0f} %"
        panel.text(left + TILE / 2, TILE + 3, text, ha="center", va="top", fontsize=7)
    panel.imshow(canvas, interpolation="nearest")


def _wrapped(name: str) -> str:
    """All of a class name, in lines that fit below an image."""
    spaced = name.replace("_", "_ ")  # where a line may end
    lines = textwrap.wrap(spaced, CHARACTERS) or [name]
    return "\n".join(line.replace("_ ", "_") for line in lines)


def tile(picture: Image.Image) -> np.ndarray:
    # Small images are shown as the pixels that they are.
    method = Image.Resampling.NEAREST if max(picture.size) < TILE else Image.Resampling.LANCZOS
    return np.asarray(ImageOps.fit(picture.convert("RGB"), (TILE, TILE), method))


def matches(samples: GateSamples, source: Source) -> bool:
    """Whether the recorded samples can be those of `source`."""
    return len(samples.frequency) == len(source.train)


def class_names_of(source: Source | None, count: int) -> Sequence[str] | None:
    """Names for `count` classes, None if `source` does not have them."""
    return source.class_names if source is not None and len(source.class_names) == count else None
