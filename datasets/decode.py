"""Pictures to uint8 tensors, in worker processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as TF

from datasets.images import fit
from datasets.order import derive_seed
from datasets.source import Split
from utils.errors import UserError

CHUNK = 32  # images that a worker decodes at a time when all are wanted


class Job(NamedTuple):
    """Images to decode together.

    Attributes:
        index: which ones.
        seed: what random crops derive from, together with the index.
    """

    index: Sequence[int]
    seed: int = 0


class Decoder(Dataset):
    """A job in, uint8 ``[B, 3, H, W]`` out.

    For an unreadable file the line of its `UserError` comes back, see `readable`: were the error raised here, the
    DataLoader would wrap that line in a traceback.

    Args:
        split: files, or arrays.
        size: (height, width) of the result.
        margin: see `datasets.images.fit`.
        resized_crop: cut a random part out of each image and scale that, instead of the whole.
    """

    def __init__(self, split: Split, size: tuple[int, int], *, margin: bool = False, resized_crop: bool = False):
        self._split = split
        self._size = size
        self._margin = margin
        self._random_crop = RandomResizedCrop(size) if resized_crop else None

    def __getitem__(self, job: Job) -> Tensor | str:
        try:
            return torch.stack([self._decode(index, job.seed) for index in job.index])
        except UserError as error:
            return str(error)

    def _decode(self, index: int, seed: int) -> Tensor:
        picture = self._split.picture(index)
        if self._random_crop is None:
            return TF.pil_to_tensor(fit(picture, self._size, self._margin))
        # torchvision draws from the global generator. Seeding that per image makes a crop independent of who
        # decodes it; putting it back keeps num_workers=0 from disturbing the training run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, index))
            return TF.pil_to_tensor(self._random_crop(picture))


def decode_loader(decoder: Decoder, jobs: list[Job], workers: int, device: torch.device, **options) -> DataLoader:
    """What `decoder` makes of each of the `jobs`, in their order; the list is read when an iteration starts."""
    return DataLoader(
        decoder,
        batch_size=None,  # a job is a batch already
        sampler=jobs,
        num_workers=workers,
        pin_memory=device.type == "cuda",
        # Its own, since it draws a seed per iteration: the global generator belongs to the training run.
        generator=torch.Generator(),
        **options,
    )


def decode_all(split: Split, size: tuple[int, int], *, margin: bool = False, workers: int = 0) -> Tensor:
    """Every image of `split` as uint8 ``[N, 3, H, W]``, see `fit`.

    Processes rather than threads: most of the time for a small image is Python's, where threads wait for each
    other (one, two and four threads all decode 2,900 images of 64x64 a second).

    Raises:
        UserError: a file cannot be read.
    """
    count = len(split)
    jobs = [Job(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]
    images = torch.empty(count, 3, *size, dtype=torch.uint8)
    workers = min(workers, len(jobs), os.cpu_count() or 1)
    decoded = decode_loader(Decoder(split, size, margin=margin), jobs, workers, torch.device("cpu"))
    for job, part in zip(jobs, decoded):
        images[job.index.start : job.index.stop] = readable(part)
    return images


def readable(decoded: Tensor | str) -> Tensor:
    """What a `Decoder` returned, or the error that it met.

    Raises:
        UserError: a file cannot be read.
    """
    if isinstance(decoded, str):
        raise UserError(decoded)
    return decoded
