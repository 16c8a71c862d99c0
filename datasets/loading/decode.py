"""Pictures to uint8 tensors."""

from __future__ import annotations

from contextlib import closing
from functools import partial

import torch
from torch import Tensor

from datasets.images import fit, to_tensor
from datasets.loading.augment import Recipe
from datasets.loading.order import derive_seed
from datasets.loading.workers import Workers, shared_images
from datasets.source import Split
from utils.errors import Unforeseen, UserError, doing
from utils.processes.group import gather_objects, rank, world_size

CHUNK = 32  # images that a worker decodes at a time when all are wanted
AS_THEY_ARE = Recipe()


class Decoder:
    """Image `index` as uint8 ``[3, H, W]``.

    Args:
        split: files, or arrays.
        size: (height, width) of the result.
        margin: see `datasets.images.fit`.
        recipe: of this, what is done when a picture is decoded.
    """

    def __init__(self, split: Split, size: tuple[int, int], *, margin: bool = False, recipe: Recipe = AS_THEY_ARE):
        self._split = split
        self._crop = partial(fit, size=size, margin=margin)
        self._change = None
        self._is_random = recipe.streams
        if recipe.streams:
            # Takes a second to import, and few data sets need it.
            from torchvision.transforms import RandomResizedCrop, v2

            self._crop = RandomResizedCrop(size) if recipe.resized_crop else self._crop
            self._change = v2.TrivialAugmentWide() if recipe.trivial else None

    def __call__(self, index: int, seed: int = 0) -> Tensor:
        """Decode an image; what is random derives from `seed` and the index.

        Raises:
            UserError: it cannot be decoded.
        """
        try:
            with doing(f"decoding image {index}"):
                return self._decode(index, seed)
        except Unforeseen:
            raise
        except UserError as error:
            raise UserError(f"{error}; dataset.on_corrupt=skip leaves such images out") from error

    def _decode(self, index: int, seed: int) -> Tensor:
        picture = self._split.picture(index)
        if not self._is_random:
            return to_tensor(self._crop(picture))
        # torchvision draws from the global generator. Seeding that per image makes a crop independent of the process
        # that decodes it; putting it back keeps num_workers=0 from disturbing the training run.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(derive_seed(seed, index))
            picture = self._crop(picture)
            return to_tensor(self._change(picture) if self._change else picture)


def decode_all(split: Split, size: tuple[int, int], *, margin: bool = False, workers: int = 0) -> Tensor:
    """Every image of `split` as uint8 ``[N, 3, H, W]``, see `fit`.

    Processes rather than threads: most of the time for a small image is Python's, where threads wait for each
    other (one, two and four threads all decode 2,900 images of 64x64 a second).

    Raises:
        UserError: a file cannot be read.
    """
    images = shared_images(len(split), size)
    decode = Decoder(split, size, margin=margin)

    def work(chunk: range) -> None:
        for index in chunk:
            images[index] = decode(index)

    with closing(Workers(work, min(workers, len(_chunks(split))))) as pool:
        for _ in pool.map(_chunks(split)):
            pass
    return images


def find_unreadable(split: Split, workers: int = 0) -> dict[int, str]:
    """The images of `split` that cannot be decoded, in order, each with a line that names the file and the reason.

    Of several processes each tries its part, and all get the same answer: a file that fails now and then must not be
    there for one and missing for another.
    """

    def work(chunk: range) -> dict[int, str]:
        found = {}
        for index in chunk:
            try:
                with doing(f"decoding image {index}"):
                    split.picture(index)
            except Unforeseen:
                raise
            except UserError as error:
                found[index] = str(error)
        return found

    chunks = _chunks(split)[rank() :: world_size()]
    with closing(Workers(work, min(workers, len(chunks)))) as pool:
        own = {index: line for found in pool.map(chunks) for index, line in found.items()}
    return dict(sorted(item for part in gather_objects(own) for item in part.items()))


def _chunks(split: Split) -> list[range]:
    count = len(split)
    return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
