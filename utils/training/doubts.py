"""Reasons why the result of a run will be poor, or says little; one line each, in every run."""

from __future__ import annotations

import filecmp
import math
import os
from collections.abc import Mapping
from contextlib import suppress
from itertools import chain
from statistics import NormalDist

from torch import Tensor

from datasets.source import Files, Source
from utils.config import Config
from utils.config.find import OWN_IMAGES
from utils.config.yaml_text import read_yaml
from utils.run_folder.layout import Layout
from utils.run_folder.records import read_file, read_result

UNEVEN = 10  # times as many images
WIDE = 2.0  # points
CONFIDENCE = 0.95
COMPARED = 500  # pairs of files


def uneven_classes(source: Source, config: Config) -> list[str]:
    """Whether some classes have far fewer training images than others, and nothing in the config makes up for it."""
    counts, names = source.labels.bincount(), source.class_names
    large, small = int(counts.argmax()), int(counts.where(counts > 0, len(source.labels)).argmin())
    if config.dataset.sampler == "balanced" or config.training.class_weights or counts[large] <= UNEVEN * counts[small]:
        return []
    return [
        f"warning: uneven classes, {counts[large]:,} training images of {names[large]} and {counts[small]:,} of "
        f"{names[small]}; dataset.sampler=balanced or training.class_weights=balanced makes up for it, and "
        "validation.best_by=class_mean chooses the best epoch by all classes alike"
    ]


def leaked_images(source: Source) -> list[str]:
    """Whether images to evaluate on are images to train on, too: one file, or two of one name, folder name and content.

    Images whose bytes stand in a table are not compared.
    """
    if not all(isinstance(split, Files) for split in source.splits().values()):
        return []
    paths = {what: [split.path(row) for row in range(len(split))] for what, split in source.splits().items()}
    known = {tuple(path.split(os.sep)[-2:]): path for path in paths["training"]}
    trained = set(paths.pop("training"))
    lines = []
    for what, others in paths.items():
        pairs = [(path, known[key]) for path in others if (key := tuple(path.split(os.sep)[-2:])) in known]
        pairs = pairs[:: max(1, len(pairs) // COMPARED)]
        same = chain((path for path in others if path in trained), (a for a, b in pairs if _same_content(a, b)))
        if first := next(same, None):
            lines.append(
                f"warning: {what} has images to train on, {first} and perhaps more; an accuracy on them says little"
            )
    return lines


def _same_content(path: str, other: str) -> bool:
    with suppress(OSError):  # such a file is refused elsewhere
        return filecmp.cmp(path, other, shallow=False)
    return False


def constant_accuracy(labels: Tensor, by: str = "top1") -> float:
    """Accuracy in percent of a network that predicts the largest class for every image.

    Args:
        labels: of the images, int64 ``[N]``.
        by: ``top1``, or ``class_mean``, the mean of the classes' accuracies.
    """
    counts = labels.bincount().double()  # as exact as the accuracies that it is compared with
    return (100 * counts.max() / counts.sum() if by == "top1" else 100 * (1 / (counts > 0).sum().double())).item()


def no_progress(best: Mapping[str, float], epoch: int, labels: Tensor, config: Config) -> list[str]:
    """Whether after a third of the epochs no epoch was better than to predict the largest class for every image.

    Args:
        best: accuracies of the best epoch so far, percent; older checkpoints have ``top1`` alone.
        epoch: that has ended, counted from 1.
        labels: of the validation images.
    """
    by, epochs = config.validation.best_by, config.training.epochs
    least = constant_accuracy(labels, by)
    if epochs < 3 or epoch != math.ceil(epochs / 3) or best.get(by, math.inf) > least:
        return []
    return [
        f"warning: after {epoch} of {epochs} epochs the best {by} is {best[by]:.2f}%, and predicting the largest class "
        f"for every image has {least:.2f}%; another training.lr may help"
    ]


def poor_teacher(top1: float, labels: Tensor, config: Config) -> list[str]:
    """Whether a teacher is too bad to learn from.

    Args:
        top1: its accuracy on the validation images, percent.
        labels: of these images.
    """
    least = constant_accuracy(labels)
    if top1 <= least:
        return [f"warning: the teacher has {top1:.2f}%, and predicting the largest class for every image {least:.2f}%"]
    alone = config.model_copy(update={"model": config.kd.student, "kd": None, "kd_loss": None}).run_dir
    best = (read_result(Layout(alone).result) or {}).get("best_top1", 0.0)
    if top1 >= best:
        return []
    return [f"warning: the teacher has {top1:.2f}%, less than the student alone: {best:.2f}% in {alone}"]


def other_images(config: Config) -> list[str]:
    """Whether the teacher's own run, which nobody named, was on another folder of images."""
    if config.dataset.name not in OWN_IMAGES or config.kd.teacher.checkpoint:
        return []
    run, here = Layout(config.teacher_checkpoint.parents[1]), config.dataset.root
    there = read_file(run.config, lambda file: str(read_yaml(file)["dataset"]["root"]))
    if there is None or os.path.realpath(there) == os.path.realpath(here):
        return []
    return [
        f"warning: the teacher in {run.path} was trained on dataset.root={there}, here {here}; a dataset.label of its "
        "own keeps a data set apart"
    ]


def wide_interval(top1: float, images: int) -> list[str]:
    """Whether an accuracy, in percent, is of so few images that its interval (Wilson's) is wide."""
    share = min(max(top1 / 100, 0.0), 1.0)  # a stand-in for a GPU gives any number
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)  # not SciPy's function, whose import takes a second
    middle, shrunk = share + z**2 / (2 * images), 1 + z**2 / images
    half = z * math.sqrt(share * (1 - share) / images + (z / (2 * images)) ** 2)
    low, high = 100 * (middle - half) / shrunk, 100 * (middle + half) / shrunk
    if high - low <= WIDE:
        return []
    return [
        f"warning: {top1:.2f}% of only {images:,} validation images: its {100 * CONFIDENCE:.0f} % interval is "
        f"{low:.1f} to {high:.1f}"
    ]
