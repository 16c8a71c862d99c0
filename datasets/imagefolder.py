"""Any images of your own: one folder per class."""

from __future__ import annotations

from pathlib import Path

from datasets.folders import class_names, find_folder, scan
from datasets.registry import register_dataset
from datasets.source import IMAGENET_NORM, Source


@register_dataset("imagefolder")
def imagefolder(root: Path) -> Source:
    """``<root>/train/<class>/**`` and ``<root>/val/<class>/**`` (or ``test``); sizes and formats may be mixed.

    The classes are the folders in ``train``, sorted; ``val`` may lack some of them.

    Raises:
        utils.errors.UserError: a folder is missing, empty or unknown; the line names it.
    """
    train, val = find_folder(root, ["train"]), find_folder(root, ["val", "test"])
    classes = class_names(train)
    return Source(scan(train, classes), scan(val, classes), classes, *IMAGENET_NORM, augment=None, image_size=None)
