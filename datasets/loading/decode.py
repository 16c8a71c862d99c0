"""Pictures to uint8 tensors, in worker processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from datasets.images import fit, to_tensor
from datasets.loading.augment import AUGMENTATIONS, Recipe
from datasets.loading.order import derive_seed
from datasets.source import Split
from utils.errors import UserError, reason
from utils.processes.group import gather_objects, rank, world_size

log = logging.getLogger("sakd")

CHUNK = 32  # images that a worker decodes at a time when all are wanted
AS_THEY_ARE = AUGMENTATIONS["none"]
SHARED_MEMORY = "/dev/shm"  # where Linux keeps it

Decoded: TypeAlias = Tensor | np.ndarray | str


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
        recipe: of this, what is done when a picture is decoded.

    Attributes:
        by_pipe: return NumPy arrays, which go from process to process through a pipe; PyTorch would put tensors into
            shared memory.
    """

    def __init__(self, split: Split, size: tuple[int, int], *, margin: bool = False, recipe: Recipe = AS_THEY_ARE):
        self.by_pipe = False
        self._split = split
        self._size = size
        self._crop = _random_resized_crop(size) if recipe.resized_crop else partial(fit, size=size, margin=margin)
        self._change = _trivial_augment() if recipe.trivial else None
        self._is_random = recipe.streams

    def __getitem__(self, job: Job) -> Decoded:
        try:
            images = torch.stack([self._decode(index, job.seed) for index in job.index])
        except UserError as error:
            return str(error)
        return images.numpy() if self.by_pipe else images

    def bytes_of(self, count: int) -> int:
        """What so many decoded images take."""
        return 3 * self._size[0] * self._size[1] * count

    def _decode(self, index: int, seed: int) -> Tensor:
        picture = self._split.picture(index)
        if not self._is_random:
            return to_tensor(self._crop(picture))
        # torchvision draws from the global generator. Seeding that per image makes a crop independent of who
        # decodes it; putting it back keeps num_workers=0 from disturbing the training run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, index))
            picture = self._crop(picture)
            return to_tensor(self._change(picture) if self._change else picture)


class Checker(Dataset):
    """A job in, the images among it that cannot be decoded out, each with the reason."""

    def __init__(self, split: Split):
        self._split = split

    def __getitem__(self, job: Job) -> dict[int, str]:
        found = {}
        for index in job.index:
            try:
                self._split.picture(index)
            except UserError as error:
                found[index] = str(error)
        return found


def decode_loader(
    decoder: Decoder, jobs: list[Job], batch_size: int, workers: int, *, pinned: bool = False, persistent: bool = False
) -> DataLoader:
    """What `decoder` makes of each of the `jobs`, in their order; the list is read when an iteration starts.

    Args:
        decoder: does the jobs.
        jobs: what to do.
        batch_size: images in a job.
        workers: processes that do it; none if the system cannot have them.
        pinned: put images into memory from which a GPU can fetch them.
        persistent: keep the workers from one iteration to the next.
    """
    workers = _possible(workers)
    # Two batches a worker wait to be fetched and two are being used; half of the memory is left to others.
    decoder.by_pipe = workers > 0 and not _has_shared_memory(2 * decoder.bytes_of(batch_size) * (2 * workers + 2))
    return _loader(decoder, jobs, workers, pin_memory=pinned, persistent_workers=persistent and workers > 0)


def decode_all(split: Split, size: tuple[int, int], *, margin: bool = False, workers: int = 0) -> Tensor:
    """Every image of `split` as uint8 ``[N, 3, H, W]``, see `fit`.

    Processes rather than threads: most of the time for a small image is Python's, where threads wait for each
    other (one, two and four threads all decode 2,900 images of 64x64 a second).

    Raises:
        UserError: a file cannot be read.
    """
    jobs = _all_jobs(split)
    images = torch.empty(len(split), 3, *size, dtype=torch.uint8)
    decoder = Decoder(split, size, margin=margin)
    decoded = decode_loader(decoder, jobs, CHUNK, _worthwhile(workers, jobs))
    for job, part in zip(jobs, decoded):
        images[job.index.start : job.index.stop] = readable(part)
    return images


def find_unreadable(split: Split, workers: int = 0) -> dict[int, str]:
    """The images of `split` that cannot be decoded, in order, each with a line that names the file and the reason.

    Of several processes each tries its part, and all get the same answer: a file that fails now and then must not be
    there for one and missing for another.
    """
    jobs = _all_jobs(split)[rank() :: world_size()]
    found = _loader(Checker(split), jobs, _possible(_worthwhile(workers, jobs)))
    own = [(index, line) for part in found for index, line in part.items()]
    return dict(sorted(item for part in gather_objects(own) for item in part))


@contextmanager
def dead_worker_as_one_line() -> Iterator[None]:
    """Turn what PyTorch raises, wherever the program is, when a worker process dies into a line with advice."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that decodes images died ({reason(error)}); is there enough memory? fewer of them, "
            "training.num_workers and validation.num_workers, need less"
        ) from error


def readable(decoded: Decoded) -> Tensor:
    """What a `Decoder` returned, or the error that it met.

    Raises:
        UserError: a file cannot be read.
    """
    if isinstance(decoded, str):
        raise UserError(f"{decoded}; dataset.on_corrupt=skip leaves such images out")
    return torch.from_numpy(decoded) if isinstance(decoded, np.ndarray) else decoded


def _loader(dataset: Dataset, jobs: list[Job], workers: int, **options) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,  # a job is a batch already
        sampler=jobs,
        num_workers=workers,
        collate_fn=_unchanged,
        worker_init_fn=_ignore_stop_signals,
        # Its own, since it draws a seed per iteration: the global generator belongs to the training run.
        generator=torch.Generator(),
        # Python 3.14 has them forked off a server that a stop signal for the whole job would end.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        **options,
    )


def _all_jobs(split: Split) -> list[Job]:
    count = len(split)
    return [Job(range(start, min(start + CHUNK, count))) for start in range(0, count, CHUNK)]


def _worthwhile(workers: int, jobs: list[Job]) -> int:
    return min(workers, len(jobs), os.cpu_count() or 1)


def _random_resized_crop(size: tuple[int, int]) -> Callable[[Image], Image]:
    from torchvision.transforms import RandomResizedCrop  # takes a second to import, and few data sets need it

    return RandomResizedCrop(size)


def _trivial_augment() -> Callable[[Image], Image]:
    from torchvision.transforms.v2 import TrivialAugmentWide

    return TrivialAugmentWide()


def _unchanged(decoded: Any) -> Any:
    return decoded


def _ignore_stop_signals(worker: int) -> None:
    # Ctrl-C and batch systems signal every process of a run. The training process decides when to stop, and needs its
    # workers for the step under way; they end with it in any case.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _possible(workers: int) -> int:
    """`workers`, or 0 where processes cannot talk to each other: the locks of their queues are shared memory too."""
    if workers:
        try:
            multiprocessing.Lock()
        except OSError as error:
            log.warning("no shared memory for workers (%s): the training process decodes the images", reason(error))
            return 0
    return workers


def _has_shared_memory(size: int) -> bool:
    if not os.path.isdir(SHARED_MEMORY) or shutil.disk_usage(SHARED_MEMORY).free >= size:
        return True
    log.warning(
        "%s has less than the %d MiB that the workers may need: images go through pipes, which is slower",
        SHARED_MEMORY,
        -(-size // 2**20),
    )
    return False
