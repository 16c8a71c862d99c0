"""Which images each step takes: a pure function of (seed, epoch, step, rank)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def derive_seed(*numbers: int) -> int:
    """One 32-bit seed from several numbers, such that (1, 2) and (2, 1) have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Order:
    """Cuts each epoch's order into batches, and each batch into one part per process.

    Args:
        count: images in the data set.
        batch_size: images per batch, all processes together.
        shuffle: a new permutation every epoch; else the images come as they are stored.
        shard: (rank, number of processes).
    """

    def __init__(self, count: int, batch_size: int, *, shuffle: bool, shard: tuple[int, int] = (0, 1)):
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rank, self.world = shard
        self._steps = -(-count // batch_size)
        # BatchNorm cannot train on one value per channel. A last batch that would leave a process with fewer than
        # two images (with none, in evaluation) joins the batch before it.
        tail = count - (self._steps - 1) * batch_size
        if self._steps > 1 and tail < self.world * (2 if shuffle else 1):
            self._steps -= 1

    def __len__(self) -> int:
        """Batches per epoch, the same for every process."""
        return self._steps

    def draw(self, generator: torch.Generator) -> Tensor:
        """The order of one epoch, int64 ``[N]`` on the CPU."""
        if self.shuffle:
            return torch.randperm(self.count, generator=generator)
        return torch.arange(self.count)

    def part(self, step: int) -> slice:
        """Places in the epoch's order that make up this process's part of batch `step`."""
        stop = self.count if step == self._steps - 1 else (step + 1) * self.batch_size
        return slice(step * self.batch_size + self.rank, stop, self.world)
