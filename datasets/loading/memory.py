"""Batches from a data set that lies on the training device as a whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from datasets.loading.augment import Augment
from datasets.loading.loader import Loader
from datasets.loading.order import Order


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
