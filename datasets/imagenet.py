"""ImageNet (Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015)."""

from __future__ import annotations

from pathlib import Path

from datasets.folders import class_names, find_folder, scan
from datasets.registry import register_dataset
from datasets.source import IMAGENET_NORM, Source


@register_dataset("imagenet")
def imagenet(root: Path) -> Source:
    """``<root>/train/<wnid>/*`` and ``<root>/val/<wnid>/*`` (or ``train_set`` and ``test_set``), 224x224.

    Its licence forbids a download without an account: the files have to be there. A subset of the classes will do.

    Raises:
        utils.errors.UserError: a folder is missing, empty or unknown; the line names it.
    """
    train = find_folder(root, ["train", "train_set"])
    val = find_folder(root, ["val", "test_set"])
    classes = class_names(train)
    return Source(
        scan(train, classes),
        scan(val, classes),
        classes,
        *IMAGENET_NORM,
        augment="resized_crop",
        image_size=(224, 224),
    )
