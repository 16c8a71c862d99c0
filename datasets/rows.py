"""From rows (an image, its label, perhaps its split) to training, validation and test images."""

from __future__ import annotations

import logging
import math
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datasets.source import IMAGENET_NORM, Files, Source
from utils.errors import UserError, enumerate_some

log = logging.getLogger("sakd")

SPLITS = {
    "train": ("train", "training", "train_set"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "test_set"),
}
_WHOLE_NUMBER = re.compile(r"([+-]?\d{1,18})(\.0*)?", re.ASCII)


def split_called(name: str) -> str | None:
    """``"train"``, ``"val"``, ``"test"``, or None: the split that people call `name`, in upper or lower case."""
    name = name.strip().casefold()
    return next((split for split, names in SPLITS.items() if name in names), None)


def plain_text(text: str) -> str:
    """`text` without blanks at its ends, with composed accents, and without bytes that are no UTF-8."""
    text = unicodedata.normalize("NFC", text.strip())
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def source_of_rows(
    make: Callable[[list[int]], Files],
    labels: Sequence[Any],
    splits: Sequence[str | None],
    val_split: float | None,
    where: str,
    *,
    class_names: Sequence[str] | None = None,
    numbers: bool = True,
) -> Source:
    """A data set out of rows. Rows without a label are left out.

    Args:
        make: of the class of each row, makes the images of all rows.
        labels: name or number of each row's class.
        splits: ``train``, ``val`` or ``test`` for each row; all None: the rows are not divided yet.
        val_split: share of the training rows that validates, where none do.
        where: what to call the data in messages.
        class_names: names of the classes that `labels` number; None: the labels are the names.
        numbers: labels that are whole numbers are classes in the order of these numbers.

    Raises:
        UserError: no row validates or trains, or a class is not trained on.
    """
    keys = _clean(labels, where, numbers)
    if class_names and all(isinstance(key, int) for key in keys if key is not None):
        names = tuple(map(plain_text, class_names))
        number = {key: key for key in keys if key is not None}
    else:
        # Numbers first, by their value.
        order = sorted({key for key in keys if key is not None}, key=lambda key: (isinstance(key, str), key))
        names = tuple(map(str, order))
        number = {key: k for k, key in enumerate(order)}
    rows: dict[str | None, list[int]] = defaultdict(list)
    for row, (key, split) in enumerate(zip(keys, splits)):
        if key is not None:
            rows[split].append(row)
    if not rows:
        raise UserError(f"{where}: holds no images")
    numbered = [number.get(key, -1) for key in keys]
    _divide(rows, numbered, names, val_split, where)
    trained = {keys[row] for row in rows["train"]}
    for split in ("val", "test"):
        if missing := sorted({str(keys[row]) for row in rows[split]} - set(map(str, trained))):
            raise UserError(f"{where}: no training images of class {enumerate_some(missing)}, which {split} has")
    images = make(numbered)
    train, val, test = (images.subset(rows[split]) for split in SPLITS)
    return Source(train, val, names, *IMAGENET_NORM, augment=None, image_size=None, test=test if len(test) else None)


def split_rows(labels: Sequence[int], names: Sequence[str], share: float, where: str) -> tuple[list[int], list[int]]:
    """Rows to train on and rows to validate on: `share` of every class, the same in every run whatever its seed.

    Args:
        labels: class of each row.
        names: of the classes.
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
        count, label = min((count, label) for label, count in Counter(labels).items())
        smallest = dict(enumerate(names)).get(label, label)
        raise UserError(
            f"dataset.val_split: {share} of {where} does not leave every class images on both sides: of {len(labels)} "
            f"images, {len(classes)} classes, {smallest!r} has {count}; 0.1 to 0.5 and more images of it would do"
        )
    return sorted(train.tolist()), sorted(val.tolist())


def _divide(
    rows: dict[str | None, list[int]], labels: Sequence[int], names: Sequence[str], val_split: float | None, where: str
) -> None:
    """Settle which rows train, validate and test. Without validation rows, test rows validate."""
    rows["train"] = rows.pop(None, []) or rows["train"]
    if val_split is not None:
        if rows["val"]:
            raise UserError(f"dataset.val_split: {where} is divided into train and val already; leave it out")
        train, val = split_rows([labels[row] for row in rows["train"]], names, val_split, where)
        rows["train"], rows["val"] = ([rows["train"][index] for index in part] for part in (train, val))
    if not rows["val"]:
        rows["val"], rows["test"] = rows["test"], []
    for split in ("train", "val"):
        if not rows[split]:
            raise UserError(
                f"{where}: the split of no image is {split}; a column split says it, or dataset.val_split=0.1"
            )


def _clean(labels: Sequence[Any], where: str, numbers: bool) -> list[str | int | None]:
    """The class of each row: one word or whole number for all its spellings, None for no label."""
    known = {label: _class_of(label, where, numbers) for label in set(labels)}
    spellings = defaultdict(set)
    for label, key in known.items():
        is_odd = isinstance(label, str) and not unicodedata.is_normalized("NFC", label)
        spellings[key].add(ascii(label) if is_odd else repr(label))
    without = spellings.pop(None, set())
    if joined := [" = ".join(sorted(names)) for names in spellings.values() if len(names) > 1]:
        log.warning("%s: one class each: %s", where, enumerate_some(sorted(joined)))
    keys = [known[label] for label in labels]
    if without:
        count = sum(key is None for key in keys)
        log.warning("%s: %d of %d images have no label (empty or -1) and are left out", where, count, len(keys))
    return keys


def _class_of(label: Any, where: str, numbers: bool) -> str | int | None:
    if label is None or label != label:  # NaN
        return None
    if isinstance(label, float):
        if not label.is_integer():
            raise UserError(f"{where}: found the label {label}, must be words or whole numbers")
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int):
        label = plain_text(str(label))
        if numbers and (number := _WHOLE_NUMBER.fullmatch(label)):
            label = int(number[1])
    return None if label in ("", -1) else label
