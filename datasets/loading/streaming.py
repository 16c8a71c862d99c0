"""Batches from image files that are decoded by worker processes while the network trains."""

from __future__ import annotations

import atexit
import multiprocessing
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from datasets.loading.augment import Augment
from datasets.loading.decode import Decoder, Job, decode_loader, readable
from datasets.loading.loader import Loader, Plan
from datasets.loading.order import Order, derive_seed
from datasets.source import Split


class StreamLoader(Loader):
    """Decodes each batch anew; only the images of a few batches are in memory at a time.

    Workers send uint8 images, a quarter of the bytes of float32; flip, crop and normalisation are done on the
    training device by the code that serves the memory loader. One epoch at a time: starting another ends the one
    before.

    Args:
        split: files, or arrays.
        order: cuts an epoch into batches.
        augment: turns uint8 images into batches.
        margin: see `datasets.images.fit`.
        workers: processes that decode; 0: the training process does.
        seed: of every order and augmentation.
        device: the training device.
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
        decoder = Decoder(split, augment.size, margin=margin, recipe=augment.recipe)
        self._jobs: list[Job] = []
        self._decoded = decode_loader(
            decoder,
            self._jobs,
            batch_size=-(-order.batch_size // order.world),
            workers=workers,
            pinned=device.type == "cuda",
            persistent=True,
        )
        self._closes_at_exit = False
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def _stores(self, plan: Plan) -> Iterator[tuple[Tensor, Tensor]]:
        seed = derive_seed(self._seed, plan.epoch)
        self._jobs[:] = [Job(part.tolist(), seed) for part in plan.order.split(plan.sizes)]
        batches = iter(self._decoded)  # from now on there are workers
        if not self._closes_at_exit:
            atexit.register(_close, weakref.ref(self))
            self._closes_at_exit = True
        for decoded in batches:
            images = self._send(readable(decoded))
            yield self.augment.pad(images), torch.arange(len(images), device=self._device)

    def close(self) -> None:
        """End the workers, which hold on to the images."""
        # Left to themselves at the end of the process, PyTorch and Python would wait for them for ever: they ignore the
        # signal by which they are then asked to go. An iteration that broke off keeps them, as long as there is a
        # traceback of it.
        workers = getattr(self.__dict__.pop("_decoded", None), "_iterator", None)
        if workers is not None:
            workers._shutdown_workers()

    def _send(self, images: Tensor) -> Tensor:
        """Copy to the device. On CUDA the host runs ahead of the device, so the copy hides behind the last step."""
        if self._copies is None:
            return images.to(self._device)
        with torch.cuda.stream(self._copies):
            sent = images.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._copies)
        sent.record_stream(current)  # else the allocator may reuse its memory while `current` still reads it
        return sent


def _close(loader: weakref.ref[StreamLoader]) -> None:
    if (there := loader()) is not None:
        there.close()
    for process in multiprocessing.active_children():
        if process.daemon:  # a worker of a loader that was garbage in a cycle, and lost the queue that ends its workers
            process.kill()
