"""From a config to a pair of loaders."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from datasets.check import check_labels, without_unreadable
from datasets.loading.augment import AUGMENTATIONS, Augment
from datasets.loading.decode import decode_all
from datasets.loading.loader import Loader
from datasets.loading.memory import MemoryLoader
from datasets.loading.order import Order
from datasets.loading.streaming import StreamLoader
from datasets.registry import DATASETS
from datasets.source import Arrays, Source, Split
from utils.errors import UserError
from utils.processes.group import main_first

log = logging.getLogger("sakd")

DEFAULT_SIZE = (32, 32)  # of images that have no native size
LARGEST_CROPPED = 64  # beyond, objects in photographs vary in scale, and so should the crops
MEMORY_LIMIT = 4 * 2**30  # bytes that a data set may take by itself; dataset.loader=memory takes more


class DataConfig(Protocol):
    """The keys ``dataset.*``; None stands for the data set's own value."""

    name: str
    root: str
    img_h: int | None
    img_w: int | None
    num_classes: int | None
    loader: str
    augment: str
    on_corrupt: str
    mean: Sequence[float] | None
    std: Sequence[float] | None


@dataclass(frozen=True)
class Data:
    """A data set, ready for training.

    Attributes:
        train: shuffled and augmented.
        val: in order and not augmented.
        num_classes: width of the logits.
        class_names: one per class, in the order of the labels.
        image_size: (height, width) of every batch.
    """

    train: Loader
    val: Loader
    num_classes: int
    class_names: tuple[str, ...]
    image_size: tuple[int, int]

    def close(self) -> None:
        """Close both loaders."""
        self.train.close()
        self.val.close()


def build_data(
    config: DataConfig,
    *,
    batch_size: int,
    val_batch_size: int,
    num_workers: int,
    val_num_workers: int,
    seed: int,
    device: torch.device | str,
    shard: tuple[int, int] = (0, 1),
) -> Data:
    """Find the data set, download it if it has to and can be, and make its loaders.

    Args:
        config: the keys ``dataset.*``.
        batch_size: images per training batch, all processes together.
        val_batch_size: images per validation batch, all processes together.
        num_workers: processes that decode training images; the memory loader has them decode once.
        val_num_workers: the same for validation images.
        seed: of every order and augmentation.
        device: where the batches are wanted.
        shard: (rank, number of processes); each gets its own part of every batch.

    Raises:
        UserError: the data is missing, damaged or not what the config says.
    """
    with main_first():  # it may have to download and unpack
        source = DATASETS.get(config.name)(Path(config.root).expanduser())
    _check_classes(config, source)
    check_labels(source)
    if config.on_corrupt == "skip":
        source = without_unreadable(source, num_workers)
    builder = _Builder(config, source, seed, torch.device(device), shard)
    return Data(
        train=builder.train(batch_size, num_workers),
        val=builder.val(val_batch_size, val_num_workers),
        num_classes=len(source.class_names),
        class_names=source.class_names,
        image_size=builder.size,
    )


class _Builder:
    """Settles what the config leaves open and makes loaders accordingly."""

    def __init__(self, config: DataConfig, source: Source, seed: int, device: torch.device, shard: tuple[int, int]):
        self.size = _image_size(config, source)
        self._source = source
        self._augment = _augmentation(config, source, self.size)
        self._norm = tuple(config.mean or source.mean), tuple(config.std or source.std)
        self._loader = config.loader
        self._seed = seed
        self._device = device
        self._shard = shard
        # Evaluation has to show objects at the scale that training showed them, see `fit`.
        self._margin = AUGMENTATIONS[self._augment].resized_crop

    def train(self, batch_size: int, workers: int) -> Loader:
        return self._make("training", self._source.train, self._augment, batch_size, workers, shuffle=True)

    def val(self, batch_size: int, workers: int) -> Loader:
        return self._make("validation", self._source.val, "none", batch_size, workers, shuffle=False)

    def _make(self, what: str, split: Split, augment: str, batch_size: int, workers: int, *, shuffle: bool) -> Loader:
        # BatchNorm cannot train on one value per channel, which is what some networks make of a single image.
        _check_batches(what, batch_size, len(split), self._shard[1], least=2 if shuffle else 1)
        order = Order(len(split), batch_size, shuffle=shuffle, shard=self._shard)
        transform = Augment(augment, self.size, *self._norm, self._device)
        if self._in_memory(len(split), transform):
            images = self._decoded(split, workers)
            return MemoryLoader(images, split.labels, order, transform, seed=self._seed, device=self._device)
        return StreamLoader(
            split,
            order,
            transform,
            margin=self._margin,
            workers=workers,
            seed=self._seed,
            device=self._device,
        )

    def _in_memory(self, count: int, augment: Augment) -> bool:
        if self._loader != "auto":
            return self._loader == "memory"
        height, width = (side + 2 * augment.padding for side in self.size)
        return not augment.recipe.resized_crop and count * 3 * height * width <= _memory_limit(self._device)

    def _decoded(self, split: Split, workers: int) -> Tensor:
        if isinstance(split, Arrays) and split.images.shape[-2:] == self.size and not self._margin:
            return split.images
        log.info("decoding %d images into memory", len(split))
        return decode_all(split, self.size, margin=self._margin, workers=workers)


def _image_size(config: DataConfig, source: Source) -> tuple[int, int]:
    # A height alone, or a width alone, means a square.
    height, width = config.img_h or config.img_w, config.img_w or config.img_h
    if height and width:
        return height, width
    if source.image_size is None:
        log.warning("dataset.img_h and img_w are not set: images are scaled to %dx%d", *DEFAULT_SIZE)
    return source.image_size or DEFAULT_SIZE


def _augmentation(config: DataConfig, source: Source, size: tuple[int, int]) -> str:
    """Name of the training augmentation."""
    if config.augment != "auto":
        name = config.augment
    elif source.augment is not None:
        name = source.augment
    else:
        name = "crop_flip" if max(size) <= LARGEST_CROPPED else "resized_crop"
    if config.loader == "memory" and AUGMENTATIONS[name].resized_crop:
        raise UserError(
            f"dataset.loader: memory holds images of {size[0]}x{size[1]}, but the augmentation {name} cuts from the "
            "full ones; set dataset.loader=stream, or dataset.augment=crop_flip"
        )
    return name


def _memory_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY_LIMIT
    free, _ = torch.cuda.mem_get_info(device)
    return min(MEMORY_LIMIT, free // 4)


def _check_classes(config: DataConfig, source: Source) -> None:
    found = len(source.class_names)
    if config.num_classes not in (None, found):
        raise UserError(
            f"dataset.num_classes: {config.num_classes} in the config, but {config.name} has {found} classes; "
            f"set dataset.num_classes={found}"
        )


def _check_batches(what: str, batch_size: int, count: int, world: int, least: int) -> None:
    if min(batch_size, count) < least * world:
        raise UserError(
            f"{what}.batch_size: batches of {batch_size} from {count} images give each of {world} processes fewer than "
            f"{least}; use a larger batch, more images or fewer processes"
        )
