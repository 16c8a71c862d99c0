"""Random crop, flip and normalisation of whole batches of uint8 images, on any device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Recipe(NamedTuple):
    """What an augmentation consists of.

    Attributes:
        crop, flip: done to whole batches, see `Augment`.
        resized_crop, trivial: done to each picture when it is decoded: a random part, scaled; one random operation
            (Müller, Hutter: *TrivialAugment*, ICCV 2021, arXiv 2103.10158). They need the streaming loader.
    """

    crop: bool = False
    flip: bool = False
    resized_crop: bool = False
    trivial: bool = False

    @property
    def streams(self) -> bool:
        """Whether part of it is done when a picture is decoded, so that every epoch has to decode anew."""
        return self.resized_crop or self.trivial


AUGMENTATIONS: dict[str, Recipe] = {
    "crop_flip": Recipe(crop=True, flip=True),
    "crop": Recipe(crop=True),
    "flip": Recipe(flip=True),
    "resized_crop": Recipe(resized_crop=True, flip=True),
    "trivialaugment": Recipe(crop=True, flip=True, trivial=True),
    "trivialaugment_resized_crop": Recipe(resized_crop=True, flip=True, trivial=True),
    "none": Recipe(),
}


class Augment:
    """What happens to a batch between uint8 pixels and the network.

    Nothing here depends on values on the device, so that no step waits for it, and a batch of n images always
    runs the same kernels: on a GPU at most five, and pixels have the same bits as on a CPU.

    Args:
        name: one of `AUGMENTATIONS`. What is done when a picture is decoded is the streaming loader's.
        size: (height, width) of the images.
        mean: of each channel, in [0, 1].
        std: of each channel, in [0, 1].
        device: where the batches are.

    Attributes:
        recipe: what the name stands for.
        size, mean, std: as given.
        padding: width of the black frame that `pad` adds before crops are cut: 4 at 32, as published, and in
            proportion.
    """

    def __init__(
        self,
        name: str,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
    ):
        self.recipe = AUGMENTATIONS[name]
        self.size, self.mean, self.std = size, mean, std
        self.padding = size[0] // 8 if self.recipe.crop else 0
        # (x / 255 - mean) / std as one multiplication and one addition.
        self._scale = (1 / (255 * torch.tensor(std, dtype=torch.float64))).float().view(3, 1, 1).to(device)
        shift = -torch.tensor(mean, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        self._shift = shift.float().view(3, 1, 1).to(device)
        # By side, from which columns an image is read, [2, W].
        column = torch.arange(size[1], device=device)
        self._columns = torch.stack([column, column.flip(0)])

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """How `count` images are moved, uniform over the crops and the two sides, int64 ``[3, count]`` on the CPU.

        The rows are: first row of the crop, counted from the edge of the padding; its first column; 1 where the image
        is mirrored, else 0.
        """

        def uniform(high: int) -> Tensor:
            return torch.randint(high, (count,), generator=generator)

        corners = 2 * self.padding + 1
        return torch.stack([uniform(high) for high in (corners, corners, 2 if self.recipe.flip else 1)])

    def pad(self, images: Tensor) -> Tensor:
        """`images` uint8 ``[N, 3, H, W]`` with the black frame that crops may reach into."""
        return F.pad(images, [self.padding] * 4) if self.padding else images

    def __call__(self, store: Tensor, rows: Tensor, moves: Tensor) -> Tensor:
        """The batch, float32 ``[B, 3, H, W]``.

        Args:
            store: padded uint8 images ``[M, 3, H + 2p, W + 2p]``.
            rows: which of them, int64 ``[B]``.
            moves: how each is moved, ``[3, B]``, see `draw`.
        """
        if not (self.recipe.crop or self.recipe.flip):
            images = store.index_select(0, rows)
        elif store.device.type == "cpu":
            images = self._copy_windows(store, rows, moves)
        else:
            images = self._index_pixels(store, rows, moves)
        return self.normalise(images)

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 ``[B, 3, H, W]`` as the network sees them, float32."""
        return torch.mul(images, self._scale).add_(self._shift)

    def _index_pixels(self, store: Tensor, rows: Tensor, moves: Tensor) -> Tensor:
        """Look up each image's window among all that there are, a view, and then the columns by side.

        Three kernels. A single index over all four dimensions would be one kernel more: CUDA first copies indices whose
        strides differ, to eight bytes per pixel.
        """
        windows = store.unfold(2, self.size[0], 1).unfold(3, self.size[1], 1)
        top, left, flip = moves
        images = windows[rows, :, top, left]
        columns = self._columns.index_select(0, flip)[:, None, None]
        return images.gather(3, columns.expand_as(images))

    def _copy_windows(self, store: Tensor, rows: Tensor, moves: Tensor) -> Tensor:
        """Copy each image's window by itself, which is faster on a CPU: 4 ms for 64 images of 224x224 instead of 19."""
        height, width = self.size
        pixels = store.numpy()
        images = np.empty((len(rows), store.shape[1], height, width), np.uint8)
        for image, row, top, left, flip in zip(images, *(numbers.tolist() for numbers in (rows, *moves))):
            window = pixels[row, :, top : top + height, left : left + width]
            image[...] = window[:, :, ::-1] if flip else window
        return torch.from_numpy(images)
