"""ImageNet (Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.folder import imagefolder
from datasets.registry import register_dataset
from datasets.source import Source


@register_dataset("imagenet")
def imagenet(root: Path, val_split: float | None = None) -> Source:
    """An `imagefolder` of ``<root>/train/<wnid>/*`` and ``<root>/val/<wnid>/*``, 224x224.

    Its licence forbids a download without an account: the files have to be there. A subset of the classes will do.
    """
    return replace(imagefolder(root, val_split), augment="resized_crop", image_size=(224, 224))
