"""What a data set hands to the loaders."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from datasets.images import fit, frame, open_rgb, to_tensor
from datasets.loading.augment import AUGMENTATIONS, Augment

Triple: TypeAlias = tuple[float, float, float]

CIFAR10_NORM: tuple[Triple, Triple] = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
CIFAR100_NORM: tuple[Triple, Triple] = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET_NORM: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Arrays:
    """Images that are in memory already, all of one size.

    Attributes:
        images: uint8 ``[N, 3, H, W]``.
        labels: int64 ``[N]``.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, index: int) -> Image.Image:
        """Image `index` as PIL knows it."""
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())


class Files:
    """Image files, decoded when they are asked for.

    Args:
        paths: one file per image.
        labels: the class of each.
        found: the files were found on disk, not in a list.

    Attributes:
        labels: int64 ``[N]``.
        found: as above.
        value_range: see `datasets.images.to_rgb`; the data set's config sets it.
    """

    value_range: tuple[float, float] | None = None

    def __init__(self, paths: Sequence[str | os.PathLike], labels: Sequence[int], *, found: bool = True):
        # One array of bytes instead of a list: reading a list's strings writes to their reference counts, which
        # makes every worker process copy the pages of a million paths.
        self._items = np.array([os.fsencode(path) for path in paths])
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.found = found

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return os.fsdecode(bytes(self._items[index]))

    def content(self, index: int) -> bytes | None:
        """The encoded image, if it is not in the file of that path."""
        return None

    def subset(self, index: Sequence[int]) -> Files:
        """The images with these indices, in this order."""
        part = copy(self)
        part._items, part.labels = self._items[list(index)], self.labels[list(index)]
        return part

    def picture(self, index: int) -> Image.Image:
        """Image `index`, in RGB.

        Raises:
            utils.errors.UserError: the file cannot be read.
        """
        return open_rgb(self.path(index), self.content(index), self.value_range)


Split: TypeAlias = Arrays | Files  # or anything else with `labels`, ``len()`` and ``picture(index)``


@dataclass(frozen=True)
class Source:
    """One data set: its images, what networks and checkpoints have to know of them, and what is customary for it.

    Attributes:
        train: images to learn from.
        val: images by which the best epoch is chosen.
        class_names: one name per class, in the order of the labels.
        mean: of each channel, in [0, 1]; what images are normalised by.
        std: of each channel, in [0, 1].
        augment: training augmentation, a name in `loading.augment.AUGMENTATIONS`; None: it depends on the size.
        image_size: (height, width) of every batch; None: the images are of any size.
        test: images that nothing is chosen by, labelled as the others; None: there are none.
        image_range: see `datasets.images.to_rgb`; the config sets it.
        decoded: every image has been decoded once, and those that cannot be are left out.
    """

    train: Split
    val: Split
    class_names: tuple[str, ...]
    mean: Triple
    std: Triple
    augment: str | None
    image_size: tuple[int, int] | None
    test: Split | None = None
    image_range: tuple[float, float] | None = None
    decoded: bool = False

    @classmethod
    def of(cls, description: dict[str, Any]) -> Source:
        """One without images, from what `describe` gave.

        Raises:
            KeyError: something is missing, as it is in files that older versions wrote.
        """
        none = Arrays(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))
        size, resize, mean, std = (tuple(description[key]) for key in ("image_size", "resize", "mean", "std"))
        names, image_range = tuple(description["classes"]), description["image_range"]
        augment = "none" if resize == size else "resized_crop"
        return cls(none, none, names, mean, std, augment, size, image_range=image_range and tuple(image_range))

    @property
    def labels(self) -> Tensor:
        """Class of every training image, int64 ``[N]``, in index order."""
        return self.train.labels

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return len(self.class_names)

    @property
    def margin(self) -> bool:
        """See `datasets.images.fit`: evaluation has to show objects at the scale that training showed them."""
        return self.augment is not None and AUGMENTATIONS[self.augment].resized_crop

    def splits(self) -> dict[str, Split]:
        """The splits by what messages call them, in a fixed order."""
        named = {"training": self.train, "validation": self.val, "test": self.test}
        return {name: split for name, split in named.items() if split is not None}

    def describe(self) -> dict[str, Any]:
        """What a checkpoint, or an exported file, says of the data that its network knows.

        ``resize`` is what `prepare` scales a picture to cover, before it cuts ``image_size`` out of the centre.
        """
        return {
            "classes": [str(name) for name in self.class_names],
            "image_size": [int(side) for side in self.image_size],
            "resize": list(frame(self.image_size, self.margin)),
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
            "image_range": self.image_range and [float(value) for value in self.image_range],
        }

    def read(self, file: str | os.PathLike) -> Tensor:
        """An image file as the network sees it in validation, float32 ``[3, H, W]``.

        Raises:
            utils.errors.UserError: the file cannot be read.
        """
        return self.prepare(open_rgb(file, value_range=self.image_range))

    def prepare(self, picture: Image.Image) -> Tensor:
        """A picture in RGB as the network sees it in validation, float32 ``[3, H, W]``."""
        return self._augment.normalise(to_tensor(fit(picture, self.image_size, self.margin)))

    @cached_property
    def _augment(self) -> Augment:
        return Augment("none", self.image_size, self.mean, self.std, torch.device("cpu"))
