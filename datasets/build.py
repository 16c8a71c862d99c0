"""From a config to a data set that is opened, and on to a pair of loaders."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from datasets.check import check_files, check_labels, warn_of_dark_images, without_unreadable
from datasets.loading.augment import AUGMENTATIONS, Augment
from datasets.loading.decode import decode_all
from datasets.loading.loader import Loader
from datasets.loading.memory import MemoryLoader
from datasets.loading.order import Order
from datasets.loading.stream import StreamLoader
from datasets.registry import DATASETS
from datasets.source import Arrays, Files, Source, Split, Triple
from utils.errors import UserError
from utils.processes.group import main_first

if TYPE_CHECKING:
    from utils.config.schema import DatasetConfig

log = logging.getLogger("sakd")

DEFAULT_SIZE = (32, 32)  # of images that have no native size
LARGEST_CROPPED = 64  # beyond, objects in photographs vary in scale, and so should the crops
SOURCE_KEYS = ("val_split", "image_range", "image_column", "label_column")  # that say what is in a data set
MEMORY_LIMIT = 4 * 2**30  # bytes that a data set may take by itself; dataset.loader=memory takes more


@dataclass(frozen=True, eq=False)
class DataInfo:
    """What networks, distillers and checkpoints have to know of a data set.

    Attributes:
        class_names: one per class, in the order of the labels.
        image_size: (height, width) of every batch.
        mean, std: of each channel, in [0, 1]; what images are normalised by.
        labels: class of every training image, int64 ``[N]``, in index order.
    """

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    mean: Triple
    std: Triple
    labels: Tensor

    @property
    def num_classes(self) -> int:
        """Width of the logits."""
        return len(self.class_names)

    def describe(self) -> dict[str, list]:
        """What a checkpoint says of the data that its network knows."""
        return {
            "classes": [str(name) for name in self.class_names],
            "image_size": [int(side) for side in self.image_size],
            "mean": [float(value) for value in self.mean],
            "std": [float(value) for value in self.std],
        }


@dataclass(frozen=True, eq=False)
class Data(DataInfo):
    """A data set, ready for training.

    Attributes:
        train: shuffled and augmented.
        val: in order and not augmented.
    """

    train: Loader
    val: Loader

    def close(self) -> None:
        """Close both loaders."""
        self.train.close()
        self.val.close()


@dataclass(frozen=True, eq=False)
class OpenedData(DataInfo):
    """A data set that is there and fits its config; no image is decoded yet.

    Attributes:
        config: the keys ``dataset.*``.
        source: where the images come from.
        augment: name of the training augmentation.
    """

    config: DatasetConfig
    source: Source
    augment: str

    def without_unreadable(self, workers: int) -> OpenedData:
        """With ``dataset.on_corrupt: skip``, the part of it that can be decoded, which decodes every image once.

        Raises:
            UserError: no image of a training class can be read, or none of validation.
        """
        if self.config.on_corrupt != "skip":
            return self
        source = without_unreadable(self.source, workers, Path(self.config.root))
        return replace(self, source=source, labels=source.train.labels)

    def check_batches(self, batch_size: int, val_batch_size: int, world: int) -> None:
        """Check that there are images enough for every process.

        Raises:
            UserError: there are not.
        """
        for name, split in self.source.splits().items():
            # BatchNorm cannot train on one value per channel, which is what some networks make of a single image.
            what, size, least = ("training", batch_size, 2) if name == "training" else ("validation", val_batch_size, 1)
            if min(size, len(split)) < least * world:
                each = f"each of {world} processes" if world > 1 else "a step"
                raise UserError(
                    f"{what}.batch_size: batches of {size} from {len(split)} images give {each} fewer than "
                    f"{least}; use a larger batch, more images or fewer processes"
                )

    def load(
        self,
        *,
        batch_size: int,
        val_batch_size: int,
        num_workers: int,
        val_num_workers: int,
        seed: int,
        device: torch.device | str,
        shard: tuple[int, int] = (0, 1),
    ) -> Data:
        """Make the loaders, which decodes all images if they are held in memory.

        Args:
            batch_size: images per training batch, all processes together.
            val_batch_size: images per validation batch, all processes together.
            num_workers: processes that decode training images; the memory loader has them decode once.
            val_num_workers: the same for validation images.
            seed: of every order and augmentation.
            device: where the batches are wanted.
            shard: (rank, number of processes); each gets its own part of every batch.

        Raises:
            UserError: an image cannot be read, or there are too few.
        """
        self.check_batches(batch_size, val_batch_size, shard[1])
        how = {"seed": seed, "device": device, "shard": shard}
        return Data(
            **{field.name: getattr(self, field.name) for field in fields(DataInfo)},
            train=self.load_split("train", batch_size, num_workers, **how),
            val=self.load_split("val", val_batch_size, val_num_workers, **how),
        )

    def load_split(
        self,
        name: Literal["train", "val", "test"],
        batch_size: int,
        workers: int,
        *,
        seed: int,
        device: torch.device | str,
        shard: tuple[int, int] = (0, 1),
    ) -> Loader:
        """The loader of one split that the source has, see `load`. Only ``train`` is shuffled and augmented."""
        split, is_train, device = getattr(self.source, name), name == "train", torch.device(device)
        balanced = split.labels if is_train and self.config.sampler == "balanced" else None
        order = Order(len(split), batch_size, shuffle=is_train, shard=shard, balanced=balanced)
        transform = Augment(self.augment if is_train else "none", self.image_size, self.mean, self.std, device)
        # Evaluation has to show objects at the scale that training showed them, see `fit`.
        margin = AUGMENTATIONS[self.augment].resized_crop
        if self._in_memory(len(split), transform, device):
            images = self._decoded(split, workers, margin=margin)
            return MemoryLoader(images, split.labels, order, transform, seed=seed, device=device)
        return StreamLoader(split, order, transform, margin=margin, workers=workers, seed=seed, device=device)

    def _in_memory(self, count: int, augment: Augment, device: torch.device) -> bool:
        if self.config.loader != "auto":
            return self.config.loader == "memory"
        height, width = (side + 2 * augment.padding for side in self.image_size)
        return not augment.recipe.streams and count * 3 * height * width <= _memory_limit(device)

    def _decoded(self, split: Split, workers: int, *, margin: bool) -> Tensor:
        if isinstance(split, Arrays) and split.images.shape[-2:] == self.image_size and not margin:
            return split.images
        log.info("decoding %d images into memory", len(split))
        return decode_all(split, self.image_size, margin=margin, workers=workers)


def open_data(config: DatasetConfig) -> OpenedData:
    """Find the data set, download it if it has to and can be, and settle what the config leaves open.

    Raises:
        UserError: the data is missing, damaged or not what the config says.
    """
    with main_first():  # it may have to download and unpack
        source = find_source(config.name, config.root, **{key: getattr(config, key) for key in SOURCE_KEYS})
    found = len(source.class_names)
    if config.num_classes not in (None, found):
        raise UserError(
            f"dataset.num_classes: {config.num_classes} in the config, but {config.name} has {found} classes; "
            f"set dataset.num_classes={found}"
        )
    check_labels(source)
    if config.on_corrupt == "error":
        check_files(source)
    warn_of_dark_images(source)
    size = _image_size(config, source)
    return OpenedData(
        class_names=source.class_names,
        image_size=size,
        mean=tuple(config.mean or source.mean),
        std=tuple(config.std or source.std),
        labels=source.train.labels,
        config=config,
        source=source,
        augment=_augmentation(config, source, size),
    )


def find_source(name: str, root: str | Path, *, image_range: Sequence[float] | None = None, **keys: Any) -> Source:
    """The data set called `name`; the other arguments are the keys ``dataset.*`` of these names, see `SOURCE_KEYS`.

    Raises:
        UserError: it is not there, or has no use for one of the keys.
    """
    find = DATASETS.get(name)
    known = inspect.signature(find).parameters
    keys = {key: value for key, value in keys.items() if value is not None}
    for key in keys:
        if key not in known:
            why = "is split into training and validation already" if key == "val_split" else "has no columns"
            raise UserError(f"dataset.{key}: {name} {why}; leave it out")
    source = find(Path(root), **keys)
    for split in source.splits().values():
        if isinstance(split, Files):
            split.value_range = image_range
    return source


def build_data(config: DatasetConfig, **how: Any) -> Data:
    """Open a data set and make its loaders, see `open_data` and `OpenedData.load` for arguments and errors."""
    return open_data(config).without_unreadable(how["num_workers"]).load(**how)


def _image_size(config: DatasetConfig, source: Source) -> tuple[int, int]:
    # A height alone, or a width alone, means a square.
    height, width = config.img_h or config.img_w, config.img_w or config.img_h
    if height and width:
        return height, width
    if source.image_size is None:
        log.warning("dataset.img_h and img_w are not set: images are scaled to %dx%d", *DEFAULT_SIZE)
    return source.image_size or DEFAULT_SIZE


def _augmentation(config: DatasetConfig, source: Source, size: tuple[int, int]) -> str:
    """Name of the training augmentation."""
    is_small = max(size) <= LARGEST_CROPPED
    if config.augment == "trivialaugment":
        name = "trivialaugment" if is_small else "trivialaugment_resized_crop"
    elif config.augment != "auto":
        name = config.augment
    elif source.augment is not None:
        name = source.augment
    else:
        name = "crop_flip" if is_small else "resized_crop"
    if config.loader == "memory" and AUGMENTATIONS[name].streams:
        raise UserError(
            f"dataset.loader: memory holds images of {size[0]}x{size[1]}, but the augmentation {name} needs the "
            "original ones in every epoch; set dataset.loader=stream, or dataset.augment=crop_flip"
        )
    return name


def _memory_limit(device: torch.device) -> int:
    if device.type != "cuda":
        return MEMORY_LIMIT
    free, _ = torch.cuda.mem_get_info(device)
    return min(MEMORY_LIMIT, free // 4)
