"""What one student gets right and wrong on its validation images."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch

from datasets.source import Source
from utils.run_folder.layout import Layout
from utils.run_folder.read import Run
from utils.training.accuracy import evaluate
from utils.training.restore import restore

MOST_IMAGES = 20_000  # a pass over more would keep the reader of a report waiting


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
