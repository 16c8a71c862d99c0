"""Batches from image files that are decoded by worker processes while the network trains."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from datasets.loading.augment import Augment
from datasets.loading.decode import Decoder
from datasets.loading.loader import Loader
from datasets.loading.order import Order, derive_seed
from datasets.loading.workers import AHEAD, Workers, image_memory
from datasets.source import Split


class StreamLoader(Loader):
    """Decodes each batch anew; only the images of a few batches are in memory at a time.

    Workers leave uint8 images, a quarter of the bytes of float32; flip, crop and normalisation are done on the
    training device by the code that serves the memory loader. One epoch at a time: starting another ends the one
    before.

    Args:
        split: files, or arrays.
        margin: see `datasets.images.fit`.
        workers: processes that decode; 0: the training process does.

    The other arguments are those of `Loader`.
    """

    def __init__(
        self,
        split: Split,
        order: Order,
        augment: Augment,
        *,
        margin: bool,
        workers: int,
        seed: int,
        device: torch.device,
    ):
        super().__init__(split.labels, order, augment, seed, device)
        decode = Decoder(split, augment.size, margin=margin, recipe=augment.recipe)

        def work(job: tuple[int, list[int], int]) -> None:
            slot, index, seed = job
            for place, number in enumerate(index):
                slots[slot, place] = decode(number, seed)

        self._workers = Workers(work, workers)
        count, largest = AHEAD * max(self._workers.count, 1), order.largest_part()
        self._slots = slots = image_memory(count * largest, augment.size).view(count, largest, 3, *augment.size)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._used: deque[torch.cuda.Event] = deque()  # of each of the last batches, behind the steps before it

    def _images(self, epoch: int, order: Sequence[Tensor], index: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        seed = derive_seed(self._seed, epoch)
        # A slot is free again when its turn comes: so many jobs are under way at most.
        jobs = [(step % len(self._slots), part.tolist(), seed) for step, part in enumerate(order)]
        for (slot, numbers, _), _ in zip(jobs, self._workers.map(jobs)):
            images = self._send(self._slots[slot, : len(numbers)])
            yield self.augment.pad(images), torch.arange(len(images), device=self._device)

    def close(self) -> None:
        self._workers.close()

    def _send(self, images: Tensor) -> Tensor:
        """Copy to the device. On CUDA the host runs ahead of the device, so the copy hides behind the last step.

        The host waits for steps that are `AHEAD` batches old, else the batches to come could fill the memory.
        """
        if self._copies is None:
            return images.to(self._device)
        with torch.cuda.stream(self._copies):
            sent = images.pin_memory().to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        self._used.append(torch.cuda.Event(blocking=True))
        self._used[-1].record(current)
        if len(self._used) > AHEAD:
            self._used.popleft().synchronize()
        sent.record_stream(current)  # else the allocator may reuse its memory while `current` still reads it
        return sent
