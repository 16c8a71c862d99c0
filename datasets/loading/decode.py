"""Pictures to uint8 tensors."""

from __future__ import annotations

import itertools
from functools import partial

import torch
from torch import Tensor

from datasets.images import fit, to_tensor
from datasets.loading.augment import AUGMENTATIONS, Recipe
from datasets.loading.order import derive_seed
from datasets.loading.workers import image_memory, map_in_workers
from datasets.source import Split
from utils.errors import UserError, doing
from utils.processes.group import gather_objects, rank, world_size

CHUNK = 32  # images that a worker decodes at a time when all are wanted


class Decoder:
    """Image `index` as uint8 ``[3, H, W]``.

    Args:
        split: files, or arrays.
        size: (height, width) of the result.
        margin: see `datasets.images.fit`.
        recipe: of this, what is done when a picture is decoded.
    """

    def __init__(
        self, split: Split, size: tuple[int, int], *, margin: bool = False, recipe: Recipe = AUGMENTATIONS["none"]
    ):
        self._split = split
        self._changes = [partial(fit, size=size, margin=margin)]
        self._is_random = recipe.streams
        if recipe.streams:
            # Takes a second to import, and few data sets need it.
            from torchvision.transforms import RandomResizedCrop, v2

            self._changes = [RandomResizedCrop(size)] if recipe.resized_crop else self._changes
            self._changes += [v2.TrivialAugmentWide()] if recipe.trivial else []

    def __call__(self, index: int, seed: int = 0) -> Tensor:
        """Decode an image; what is random derives from `seed` and the index.

        Raises:
            UserError: it cannot be decoded.
        """
        with doing(f"decoding image {index}"):
            try:
                picture = self._split.picture(index)
            except UserError as error:
                raise UserError(f"{error}; dataset.on_corrupt=skip leaves such images out") from error
            # torchvision draws from the global generator. Seeding that per image makes a crop independent of the
            # process that decodes it; putting it back keeps num_workers=0 from disturbing the training run.
            with torch.random.fork_rng(devices=[], enabled=self._is_random):
                if self._is_random:
                    torch.default_generator.manual_seed(derive_seed(seed, index))
                for change in self._changes:
                    picture = change(picture)
            return to_tensor(picture)


def decode_all(split: Split, size: tuple[int, int], *, margin: bool = False, workers: int = 0) -> Tensor:
    """Every image of `split` as uint8 ``[N, 3, H, W]``, see `fit`.

    Processes rather than threads: most of the time for a small image is Python's, where threads wait for each
    other (one, two and four threads all decode 2,900 images of 64x64 a second).

    Raises:
        UserError: a file cannot be read.
    """
    images = image_memory(len(split), size)
    decode = Decoder(split, size, margin=margin)

    def work(chunk: range) -> None:
        for index in chunk:
            images[index] = decode(index)

    for _ in map_in_workers(work, _chunks(split), workers):
        pass
    return images


def find_unreadable(split: Split, workers: int = 0) -> dict[int, str]:
    """The images of `split` that cannot be decoded, in order, each with a line that names the file and the reason.

    Of several processes each tries its part, and all get the same answer: a file that fails now and then must not be
    there for one and missing for another.
    """

    def work(chunk: range) -> list[tuple[int, str]]:
        found = []
        for index in chunk:
            with doing(f"decoding image {index}"):
                try:
                    split.picture(index)
                except UserError as error:
                    found.append((index, str(error)))
        return found

    chunks = _chunks(split)[rank() :: world_size()]
    own = [item for found in map_in_workers(work, chunks, workers) for item in found]
    return dict(sorted(itertools.chain(*gather_objects(own))))


def _chunks(split: Split) -> list[range]:
    count = len(split)
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
