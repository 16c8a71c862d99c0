"""What one student gets right and wrong on its validation images."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from datasets.source import Source, Split
from utils.errors import UserError
from utils.report.gallery import TILE, tile
from utils.report.style import REFERENCE, SELECTION_COLORS, figure_legend, label_width, mark, styled
from utils.run_folder.layout import Layout
from utils.run_folder.read import Run
from utils.training.accuracy import evaluate
from utils.training.restore import restore

MOST_IMAGES = 20_000  # a pass over more would keep the reader of a report waiting
MISTAKES = (3, 6)  # rows and columns of images
SHOWN_CLASSES = 40


@dataclass(frozen=True)
class Predictions:
    """Of all validation images, in their order.

    Attributes:
        labels, predicted: classes, int64 ``[N]``.
        certainty: probability of the predicted class, ``[N]``.
    """

    labels: np.ndarray
    predicted: np.ndarray
    certainty: np.ndarray

    def confusion(self, classes: int) -> np.ndarray:
        """Counts ``[C, C]``; true class by row, predicted by column."""
        counts = np.bincount(self.labels * classes + self.predicted, minlength=classes * classes)
        return counts.reshape(classes, classes)

    def worst(self, count: int) -> np.ndarray:
        """Indices of the wrong predictions of which the student is most certain."""
        wrong = np.flatnonzero(self.labels != self.predicted)
        return wrong[np.argsort(-self.certainty[wrong], kind="stable")][:count]


def predict(run: Run, source: Source) -> Predictions | None:
    """What the best checkpoint of a run predicts; None where there is no such checkpoint, or too many images.

    Raises:
        UserError: the checkpoint or an image cannot be read, or the network's code would have to be trusted.
    """
    file = Layout(run.path).best
    if not file.exists() or len(source.val) > MOST_IMAGES:
        return None
    restored = restore(file, ["training.device=cpu"])
    found: list[tuple[torch.Tensor, ...]] = []

    def keep(logits: torch.Tensor, label: torch.Tensor) -> None:
        certainty, predicted = logits.softmax(dim=1).max(dim=1)
        found.append((label, predicted, certainty))

    evaluate(restored.student(), restored.val, restored.device, after_batch=keep)
    return Predictions(*(torch.cat(values).numpy() for values in zip(*found)))


def class_figure(predictions: Predictions, class_names: tuple[str, ...], title: str) -> Figure:
    """How many images each class has and how often each is predicted; the most frequent classes first."""
    classes = len(class_names)
    columns = {"images": predictions.labels, "predicted": predictions.predicted}
    counts = {name: np.bincount(values, minlength=classes) for name, values in columns.items()}
    table = pd.DataFrame(counts, index=list(class_names)).sort_values("images", ascending=False, kind="stable")
    table = table.head(SHOWN_CLASSES)
    with styled():
        size = (6.4 + label_width(list(table.index)), 0.22 * len(table) + 1.3)
        figure = Figure(figsize=size, layout="constrained")
        panel = figure.subplots()
        colors = {"images": REFERENCE, "predicted": SELECTION_COLORS["adaptive"]}
        for shift, (name, values) in zip((-0.2, 0.2), table.items()):
            panel.barh(np.arange(len(table)) + shift, values, 0.38, color=colors[name])
        panel.set_yticks(range(len(table)), table.index, fontsize=7)
        panel.set_ylim(len(table) - 0.5, -0.5)
        panel.grid(axis="y", visible=False)
        more = f" ({SHOWN_CLASSES} of {classes} classes)" if classes > SHOWN_CLASSES else ""
        panel.set(xlabel=f"validation images{more}")
        figure_legend(figure, [mark(name, color, lw=5) for name, color in colors.items()])
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure


def mistakes_figure(predictions: Predictions, split: Split, class_names: tuple[str, ...], title: str) -> Figure:
    """The images that the student is most certain of and wrong about: the true class, then the predicted one."""
    rows, columns = MISTAKES
    worst = predictions.worst(rows * columns)
    with styled():
        figure = Figure(figsize=(1.5 * columns, 1.75 * rows + 0.3), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for panel in axes:
            panel.set_axis_off()
        for panel, index in zip(axes, worst):
            try:
                panel.imshow(tile(split.picture(int(index))), interpolation="nearest")
            except UserError:  # it was there when the run began
                panel.imshow(np.full((TILE, TILE, 3), 255, dtype=np.uint8))
            true, wrong = (class_names[values[index]] for values in (predictions.labels, predictions.predicted))
            text = f"{true}\n→ {wrong} {100 * predictions.certainty[index]:.0f} %"
            panel.set_title("\n".join(textwrap.fill(line, 24) for line in text.split("\n")), fontsize=7)
        figure.suptitle(title, x=0.01, ha="left", fontsize=9)
    return figure
