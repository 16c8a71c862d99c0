"""What one student gets right and wrong on its validation images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from datasets.source import Source
from utils.report.style import REFERENCE, SELECTION_COLORS, figure_legend, label_width, mark, styled, title_lines
from utils.run_folder.layout import Layout
from utils.run_folder.read import Run
from utils.training.accuracy import evaluate
from utils.training.restore import restore

MOST_IMAGES = 20_000  # a pass over more would keep the reader of a report waiting
SHOWN_CLASSES = 40


def predict(run: Run, source: Source) -> pd.DataFrame | None:
    """What the best checkpoint of a run predicts; None where there is no such checkpoint, or too many images.

    Returns:
        a row for each validation image, in their order: ``label``, ``predicted``, and the probability of that,
        ``certainty``.

    Raises:
        UserError: the checkpoint or an image cannot be read, or the network's code would have to be trusted.
    """
    file = Layout(run.path).best
    if not file.exists() or len(source.val) > MOST_IMAGES:
        return None
    restored = restore(file, ["training.device=cpu"])
    found: list[pd.DataFrame] = []

    def keep(logits: torch.Tensor, label: torch.Tensor) -> None:
        certainty, predicted = logits.softmax(dim=1).max(dim=1)
        found.append(pd.DataFrame({"label": label, "predicted": predicted, "certainty": certainty}))

    evaluate(restored.student(), restored.val, restored.device, after_batch=keep)
    return pd.concat(found, ignore_index=True)


def confusion_of(predictions: pd.DataFrame, classes: int) -> np.ndarray:
    """Counts ``[C, C]``; true class by row, predicted by column."""
    counts = pd.crosstab(predictions["label"], predictions["predicted"])
    return counts.reindex(index=range(classes), columns=range(classes), fill_value=0).to_numpy()


def worst(predictions: pd.DataFrame, count: int) -> pd.DataFrame:
    """The wrong predictions of which the student is most certain."""
    wrong = predictions[predictions["label"] != predictions["predicted"]]
    return wrong.sort_values("certainty", ascending=False, kind="stable").head(count)


@styled()
def count_figure(confusion: np.ndarray, class_names: Sequence[str], title: str) -> Figure:
    """How many images each class has and how often each is predicted; the most frequent classes first.

    Args:
        confusion: see `confusion_of`.
    """
    columns = {"images": confusion.sum(axis=1), "predicted": confusion.sum(axis=0)}
    table = pd.DataFrame(columns, index=list(class_names)).sort_values("images", ascending=False, kind="stable")
    table = table.head(SHOWN_CLASSES)
    figure = Figure(figsize=(6.4 + label_width(list(table.index)), 0.22 * len(table) + 1.3), layout="constrained")
    panel = figure.subplots()
    colors = {"images": REFERENCE, "predicted": SELECTION_COLORS["adaptive"]}
    for shift, (name, values) in zip((-0.2, 0.2), table.items()):
        panel.barh(np.arange(len(table)) + shift, values, 0.38, color=colors[name])
    panel.set_yticks(range(len(table)), table.index, fontsize=7)
    panel.set_ylim(len(table) - 0.5, -0.5)
    panel.grid(axis="y", visible=False)
    more = f" ({SHOWN_CLASSES} of {len(class_names)} classes)" if len(class_names) > SHOWN_CLASSES else ""
    panel.set(xlabel=f"validation images{more}")
    figure_legend(figure, [mark(name, color, lw=5) for name, color in colors.items()])
    panel.set_title(title_lines(figure, title))  # below the legend
    return figure
