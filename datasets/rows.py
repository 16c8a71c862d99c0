"""From rows (an image, its label, perhaps its split) to training and validation images."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np

from datasets.folders import VALIDATION, enumerate_some
from datasets.source import IMAGENET_NORM, Source, Split
from utils.errors import UserError

log = logging.getLogger("sakd")


def split_rows(labels: Sequence[int], share: float, where: str) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on: `share` of every class, the same in every run whatever its seed.

    Args:
        labels: class of each row.
        share: ``dataset.val_split``; where that is fewer images than there are classes, so many are taken.
        where: what to call the data in messages.

    Raises:
        UserError: a class has too few images for that.
    """
    from sklearn.model_selection import train_test_split  # takes a second to import, and few need it

    classes = set(labels)
    size = math.ceil(share * len(labels))
    if size < len(classes):
        log.warning("dataset.val_split: %s of %s is %d images; one for each class is taken", share, where, size)
        size = len(classes)
    try:
        train, val = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=0)
        divided = all({labels[row] for row in rows} == classes for rows in (train, val))
    except ValueError:  # there are fewer images than classes on a side
        divided = False
    if not divided:
        counts = np.bincount(labels)
        raise UserError(
            f"dataset.val_split: {share} of {where} does not leave every class images on both sides: of {len(labels)} "
            f"images, {len(counts)} classes, the smallest class has {counts.min()}; 0.1 to 0.5 and more images would do"
        )
    return sorted(train.tolist()), sorted(val.tolist())


def source_of_rows(
    labels: Sequence[str | int],
    splits: Sequence[str] | None,
    take: Callable[[list[int], list[int]], Split],
    val_split: float | None,
    where: str,
) -> Source:
    """A data set out of rows.

    Args:
        labels: name or number of each row's class.
        splits: ``train`` or one of `VALIDATION` for each row; None: there is no such column.
        take: makes a split of row numbers and their labels.
        val_split: share of the rows that validates, where `splits` is None.
        where: what to call the data in messages.

    Raises:
        UserError: there is no row, no split, or both a column and ``dataset.val_split``.
    """
    if not labels:
        raise UserError(f"{where}: holds no images")
    if len({type(label) for label in labels}) > 1:  # tables of one folder may have them as other types
        labels = list(map(str, labels))
    classes = sorted(set(labels), key=lambda name: (0, int(name), str(name)) if _is_number(name) else (1, 0, name))
    number = {name: k for k, name in enumerate(classes)}
    numbers = [number[label] for label in labels]
    if splits is None and val_split is None:
        raise UserError(
            f"{where}: says of no image whether it validates; add a column split, or set dataset.val_split=0.1"
        )
    if splits is not None and val_split is not None:
        raise UserError(f"dataset.val_split: {where} has a column split already; leave one of the two out")
    if splits is None:
        train, val = split_rows(numbers, val_split, where)
    else:
        unknown = sorted({str(split) for split in splits} - {"train", *VALIDATION})
        if unknown:
            raise UserError(f"{where}: split {enumerate_some(unknown)}, must be train or {' or '.join(VALIDATION)}")
        train = [row for row, split in enumerate(splits) if split == "train"]
        val = [row for row, split in enumerate(splits) if split != "train"]
        for name, rows in (("train", train), ("val", val)):
            if not rows:
                raise UserError(f"{where}: split of no image is {name}")
        if missing := sorted({str(labels[row]) for row in val} - {str(labels[row]) for row in train}):
            raise UserError(f"{where}: no image to train on of {enumerate_some(missing)}, which is to be validated")
    parts = [take(rows, [numbers[row] for row in rows]) for rows in (train, val)]
    return Source(*parts, tuple(map(str, classes)), *IMAGENET_NORM, augment=None, image_size=None)


def _is_number(name: str | int) -> bool:
    return isinstance(name, int) or (name.isascii() and name.isdigit() and len(name) < 20)
