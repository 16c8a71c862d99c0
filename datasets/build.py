"""From a config to a data set that fits it, and on to a pair of loaders."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from datasets.check import check_files, check_labels, warn_of_dark_images
from datasets.loading.augment import AUGMENTATIONS, Augment
from datasets.loading.decode import decode_all
from datasets.loading.loader import Loader, MemoryLoader
from datasets.loading.order import Order
from datasets.loading.stream import StreamLoader
from datasets.registry import DATASETS
from datasets.source import Arrays, Files, Source
from utils.errors import UserError, doing
from utils.processes.group import main_first

if TYPE_CHECKING:
    from utils.config.schema import DatasetConfig

log = logging.getLogger("sakd")

DEFAULT_SIZE = (32, 32)  # of images that have no native size
LARGEST_CROPPED = 64  # beyond, objects in photographs vary in scale, and so should the crops
SOURCE_KEYS = ("val_split", "image_range", "image_column", "label_column")  # that say what is in a data set
MEMORY_LIMIT = 4 * 2**30  # bytes that a data set may take by itself; dataset.loader=memory takes more


@dataclass(frozen=True)
class Data:
    """A data set, ready for training.

    Attributes:
        source: what it holds.
        train: its training images, shuffled and augmented.
        val: its validation images, in order and not augmented.
    """

    source: Source
    train: Loader
    val: Loader

    def close(self) -> None:
        """Close both loaders."""
        self.train.close()
        self.val.close()


def open_data(config: DatasetConfig) -> Source:
    """Find the data set, download it if it has to and can be, and settle what it leaves open. No image is decoded yet.

    Raises:
        UserError: the data is missing, damaged or not what the config says.
    """
    with main_first():  # it may have to download and unpack
        source = find_source(config.name, config.root, **{key: getattr(config, key) for key in SOURCE_KEYS})
    if config.num_classes not in (None, source.num_classes):
        raise UserError(
            f"dataset.num_classes: {config.num_classes} in the config, but {config.name} has {source.num_classes} "
            f"classes; set dataset.num_classes={source.num_classes}"
        )
    check_labels(source)
    if config.on_corrupt == "error":
        check_files(source)
    warn_of_dark_images(source)
    # A height alone, or a width alone, means a square.
    size = (config.img_h or config.img_w, config.img_w or config.img_h) if config.img_h or config.img_w else None
    if not (size or source.image_size):
        log.warning("dataset.img_h and img_w are not set: images are scaled to %dx%d", *DEFAULT_SIZE)
    size = size or source.image_size or DEFAULT_SIZE
    mean, std = tuple(config.mean or source.mean), tuple(config.std or source.std)
    known = {"image_size": size, "mean": mean, "std": std, "image_range": config.image_range}
    return replace(source, **known, augment=_augmentation(config, source, size))


def find_source(name: str, root: str | Path, *, image_range: Sequence[float] | None = None, **keys: Any) -> Source:
    """The data set called `name`; the other arguments are the keys ``dataset.*`` of these names, see `SOURCE_KEYS`.

    Raises:
        UserError: it is not there, or has no use for one of the keys.
    """
    find = DATASETS.get(name)
    given = {key: value for key, value in keys.items() if value is not None}
    if idle := sorted(given.keys() - inspect.signature(find).parameters.keys()):  # names of columns, say
        raise UserError(f"dataset.{idle[0]}: {name} has no use for it; leave it out")
    with doing(f"opening the data set {name}"):
        source = find(Path(root), **given)
    for split in source.splits().values():
        if isinstance(split, Files):
            split.value_range = image_range
        elif image_range is not None:
            raise UserError(f"dataset.image_range: {name} has no use for it; leave it out")
    return source


def check_batches(source: Source, batch_size: int, val_batch_size: int, world: int) -> None:
    """Raise a UserError where a split has too few images for every process."""
    # BatchNorm cannot train on one value per channel, which is what some networks make of a single image.
    for what, split in source.splits().items():
        key, size, least = ("training", batch_size, 2) if what == "training" else ("validation", val_batch_size, 1)
        if min(size, len(split)) < least * world:
            each = f"each of {world} processes" if world > 1 else "a step"
            raise UserError(
                f"{key}.batch_size: batches of {size} from {len(split)} images give {each} fewer than {least}; use a "
                "larger batch, more images or fewer processes"
            )


def make_loader(
    source: Source,
    config: DatasetConfig,
    name: Literal["train", "val", "test"],
    batch_size: int,
    workers: int,
    *,
    seed: int,
    device: torch.device | str,
    shard: tuple[int, int] = (0, 1),
) -> Loader:
    """The loader of one split of a data set that `open_data` found. Only ``train`` is shuffled and augmented.

    Args:
        source: the data set.
        config: the keys ``dataset.*``.
        name: of the split.
        batch_size: images per batch, all processes together.
        workers: processes that decode; for a data set that is held in memory, they do so once, now.
        seed: of every order and augmentation.
        device: where the batches are wanted.
        shard: (rank, number of processes); each gets its own part of every batch.

    Raises:
        UserError: an image cannot be read.
    """
    split, is_train, device = getattr(source, name), name == "train", torch.device(device)
    balanced = split.labels if is_train and config.sampler == "balanced" else None
    order = Order(len(split), batch_size, shuffle=is_train, shard=shard, balanced=balanced)
    size = source.image_size
    augment = Augment(source.augment if is_train else "none", size, source.mean, source.std, device)
    margin = source.margin
    if not _fits_memory(config, len(split), augment, device):
        return StreamLoader(split, order, augment, margin=margin, workers=workers, seed=seed, device=device)
    if isinstance(split, Arrays) and split.images.shape[-2:] == size and not margin:
        images = split.images
    else:
        log.info("decoding %d images into memory", len(split))
        images = decode_all(split, size, margin=margin, workers=workers)
    return MemoryLoader(images, split.labels, order, augment, seed=seed, device=device)


def _augmentation(config: DatasetConfig, source: Source, size: tuple[int, int]) -> str:
    """Name of the training augmentation."""
    is_small = max(size) <= LARGEST_CROPPED
    if config.augment == "trivialaugment":
        name = "trivialaugment" if is_small else "trivialaugment_resized_crop"
    elif config.augment != "auto":
        name = config.augment
    else:
        name = source.augment or ("crop_flip" if is_small else "resized_crop")
    if config.loader == "memory" and AUGMENTATIONS[name].streams:
        raise UserError(
            f"dataset.loader: memory holds images of {size[0]}x{size[1]}, but the augmentation {name} needs the "
            "original ones in every epoch; set dataset.loader=stream, or dataset.augment=crop_flip"
        )
    return name


def _fits_memory(config: DatasetConfig, count: int, augment: Augment, device: torch.device) -> bool:
    if config.loader != "auto":
        return config.loader == "memory"
    limit = MEMORY_LIMIT
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        limit = min(limit, free // 4)
    height, width = (side + 2 * augment.padding for side in augment.size)
    return not augment.recipe.streams and count * 3 * height * width <= limit
