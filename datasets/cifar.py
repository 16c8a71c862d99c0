"""CIFAR-10 and CIFAR-100 (Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from datasets.download import provide
from datasets.registry import register_dataset
from datasets.source import CIFAR10_NORM, CIFAR100_NORM, Arrays, Source, Triple
from utils.errors import UserError

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10


@register_dataset("cifar-10")
def cifar10(root: Path) -> Source:
    """50,000 training and 10,000 test images of 10 classes, 32x32, from ``<root>/cifar-10-batches-py``."""
    return _load("CIFAR10", root, CIFAR10_NORM)


@register_dataset("cifar-100")
def cifar100(root: Path) -> Source:
    """50,000 training and 10,000 test images of 100 classes, 32x32, from ``<root>/cifar-100-python``."""
    return _load("CIFAR100", root, CIFAR100_NORM)


def _load(name: str, root: Path, norm: tuple[Triple, Triple]) -> Source:
    from torchvision import datasets  # takes a second to import, which other data sets need not wait for

    reader: type[CIFAR10] = getattr(datasets, name)
    folder = provide(root, reader.base_folder, reader.url, reader.tgz_md5)
    try:
        train, val = reader(root, train=True), reader(root, train=False)
    except RuntimeError as error:  # torchvision compares the checksum of every file
        raise UserError(
            f"{folder}: files are missing or damaged; delete the folder and {root / reader.filename} and run again"
        ) from error
    return Source(_arrays(train), _arrays(val), tuple(train.classes), *norm, augment="crop_flip", image_size=(32, 32))


def _arrays(data: CIFAR10) -> Arrays:
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Arrays(images, torch.tensor(data.targets, dtype=torch.int64))
