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
        balanced: class of each image, int64 ``[N]``: every epoch shows all classes equally often, so it leaves out
            images of large classes and repeats those of small ones. None: it shows each image once.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        *,
        shuffle: bool,
        shard: tuple[int, int] = (0, 1),
        balanced: Tensor | None = None,
    ):
        self.count = count
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.rank, self.world = shard
        self._rows_of_classes: list[Tensor] = []
        if balanced is not None:
            counts = balanced.unique(return_counts=True)[1]
            self._rows_of_classes = list(balanced.argsort(stable=True).split(counts.tolist()))
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
        if self._rows_of_classes:
            return self._draw_balanced(generator)
        if self.shuffle:
            return torch.randperm(self.count, generator=generator)
        return torch.arange(self.count)

    def part(self, step: int) -> slice:
        """The positions in the epoch's order that make up this process's part of batch `step`."""
        stop = self.count if step == self._steps - 1 else (step + 1) * self.batch_size
        return slice(step * self.batch_size + self.rank, stop, self.world)

    def largest_part(self) -> int:
        """Number of images of this process in its largest batch."""
        return max(len(range(self.count)[self.part(step)]) for step in (0, self._steps - 1))

    def _draw_balanced(self, generator: torch.Generator) -> Tensor:
        """Whole permutations of each class, the last one cut short, until it has its share; then all shuffled."""
        classes = len(self._rows_of_classes)
        drawn = []
        # The images left over when `count` is divided go to other classes in every epoch.
        for turn, number in enumerate(torch.randperm(classes, generator=generator).tolist()):
            rows = self._rows_of_classes[number]
            share = self.count // classes + (turn < self.count % classes)
            rounds = [torch.randperm(len(rows), generator=generator) for _ in range(-(-share // len(rows)))]
            drawn += [rows[torch.cat(rounds)[:share]]] if rounds else []
        together = torch.cat(drawn)
        return together[torch.randperm(self.count, generator=generator)]
