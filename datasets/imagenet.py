"""ImageNet (Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.folder import find_folder, source_of_folders
from datasets.registry import register_dataset
from datasets.source import Source


@register_dataset("imagenet")
def imagenet(root: Path) -> Source:
    """``<root>/train/<wnid>/*`` and ``<root>/val/<wnid>/*`` (or ``train_set`` and ``test_set``), 224x224.

    Its licence forbids a download without an account: the files have to be there. A subset of the classes will do.

    Raises:
        utils.errors.UserError: a folder is missing, empty or unknown; the line names it.
    """
    parts = {"train": find_folder(root, ["train", "train_set"]), "val": find_folder(root, ["val", "test_set"])}
    return replace(source_of_folders(parts, None, str(root)), augment="resized_crop", image_size=(224, 224))
