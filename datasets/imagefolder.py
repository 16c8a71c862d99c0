"""Any images of your own: one folder per class."""

from __future__ import annotations

from pathlib import Path

from datasets.folders import VALIDATION, class_names, find_folder, scan
from datasets.registry import register_dataset
from datasets.rows import split_rows
from datasets.source import IMAGENET_NORM, Source
from utils.errors import UserError


@register_dataset("imagefolder")
def imagefolder(root: Path, val_split: float | None = None) -> Source:
    """``<root>/train/<class>/**`` and ``<root>/val/<class>/**``; sizes and formats may be mixed.

    The classes are the folders in ``train``, sorted; ``val``, or the first of `VALIDATION` that is there, may lack some
    of them. With `val_split` the images are in ``<root>/<class>/**``, and that share of every class validates.

    Raises:
        utils.errors.UserError: a folder is missing, empty or unknown; the line names it.
    """
    if val_split is not None:
        return _split_folder(root, val_split)
    train, val = find_folder(root, ["train"]), find_folder(root, VALIDATION)
    classes = class_names(train)
    return Source(scan(train, classes), scan(val, classes), classes, *IMAGENET_NORM, augment=None, image_size=None)


def _split_folder(root: Path, val_split: float) -> Source:
    if not root.is_dir():
        raise UserError(f"dataset.root: {root} is no folder; images belong in {root}/<class>/")
    if (root / "train").is_dir() and (split := [name for name in VALIDATION if (root / name).is_dir()]):
        raise UserError(f"dataset.val_split: {root} is split into train and {split[0]} already; leave it out")
    classes = class_names(root)
    images = scan(root, classes)
    train, val = (images.subset(rows) for rows in split_rows(images.labels.tolist(), val_split, str(root)))
    return Source(train, val, classes, *IMAGENET_NORM, augment=None, image_size=None)
