"""What both loaders have in common, and the one for a data set that lies on the training device as a whole."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from datasets.batch import Batch
from datasets.loading.augment import Augment
from datasets.loading.order import Order, derive_seed


class Loader(ABC):
    """Batches of one data set, on the training device.

    An epoch's order and augmentation are drawn at once, on the CPU, for all processes, from (seed, epoch): a
    batch depends neither on where the epoch was started nor on the number of processes or the kind of device, and
    no step waits for the device.

    Args:
        labels: int64 ``[N]``, of the whole data set.
        order: cuts an epoch into batches.
        augment: turns uint8 images into batches.
        seed: of every order and augmentation.
        device: where the batches are wanted.

    Attributes:
        labels: as given, on the CPU.
        num_samples: images in the data set, all processes together.
        augment: as given.
    """

    def __init__(self, labels: Tensor, order: Order, augment: Augment, seed: int, device: torch.device):
        self.labels = labels
        self.num_samples = len(labels)
        self._order = order
        self.augment = augment
        self._seed = seed
        self._device = device
        self._device_labels = labels.to(device)

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self._order)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Batches number `start`, `start` + 1, … of an epoch, the very ones that the whole epoch yields.

        A batch of this process holds every ``world``-th image of the global batch. The last batch is smaller
        than the others, or larger where too small a rest was added to it (see `Order`).
        """
        # Everything random is drawn, and looked up, for the whole epoch at once: a step only cuts out its part.
        generator = torch.Generator().manual_seed(derive_seed(self._seed, epoch))
        order = self._order.draw(generator)
        drawn = torch.cat([order[None], self.augment.draw(len(order), generator)])
        positions = torch.arange(len(order))
        parts = [positions[self._order.part(step)] for step in range(start, len(self))]
        own, sizes = torch.cat([positions[:0], *parts]), [len(part) for part in parts]
        drawn = drawn[:, own].to(self._device, non_blocking=True)
        labels, rows = self._device_labels.index_select(0, drawn[0]).split(sizes), drawn[0].split(sizes)
        images = self._images(epoch, order[own].split(sizes), rows)
        for label, index, moves, (store, places) in zip(labels, rows, drawn[1:].split(sizes, dim=1), images):
            yield Batch(self.augment(store, places, moves), label, index)

    @abstractmethod
    def close(self) -> None:
        """Free the images, or end the processes that read them. No epoch can follow."""

    @abstractmethod
    def _images(self, epoch: int, order: Sequence[Tensor], index: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """For each step: padded uint8 images on the device, and which of them to take.

        Args:
            epoch: number of the epoch.
            order: index in the data set of each image of each step, int64, on the CPU.
            index: these indices on the training device.
        """


class MemoryLoader(Loader):
    """Holds every image as uint8 on the training device and augments whole batches there.

    Args:
        images: uint8 ``[N, 3, H, W]``.
        augment: must not need images in full size.

    The other arguments are those of `Loader`.
    """

    def __init__(
        self, images: Tensor, labels: Tensor, order: Order, augment: Augment, *, seed: int, device: torch.device
    ):
        super().__init__(labels, order, augment, seed, device)
        # Padded once here, so that a crop is nothing but a copy.
        self._store = augment.pad(images).to(device).contiguous()

    def _images(self, epoch: int, order: Sequence[Tensor], index: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self._store, rows) for rows in index)

    def close(self) -> None:
        del self._store
