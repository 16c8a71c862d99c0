"""Features that are not maps ``[B, C, H, W]``, seen as such: tokens of transformers, and maps with channels last.

The rule for a feature between two stages:

* ``[B, H, W, C]``: its first two sizes stand to each other as the sides of the image do, and the last two do not. It
  becomes ``[B, C, H, W]``.
* ``[B, N, D]``: tokens. The last ``h * w`` of them lie on a grid, by rows, whose sides stand to each other as those of
  the image do. The ``P = N - h * w`` before them (a class token, registers) are about the whole image and are repeated
  at every position: ``[B, (1 + P) * D, h, w]``.

Nothing is lost, so a network goes on from what it is handed: of the repeated tokens it takes the mean over all
positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MOST_PREFIX_TOKENS = 8  # beyond, tokens are no image


@dataclass(frozen=True)
class ChannelsLast:
    """Maps ``[B, H, W, C]``."""

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        """Height and width of a feature of `shape`, which has no batch dimension."""
        return shape[0], shape[1]

    def to_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def from_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Tokens:
    """Tokens ``[B, prefix + height * width, D]``."""

    prefix: int
    height: int
    width: int

    def size(self, shape: Sequence[int]) -> tuple[int, int]:
        return self.height, self.width

    def to_map(self, x: Tensor) -> Tensor:
        size = (self.height, self.width)
        image = x[:, self.prefix :].transpose(1, 2).unflatten(2, size)
        if not self.prefix:
            return image
        whole = x[:, : self.prefix].flatten(1)[:, :, None, None].expand(-1, -1, *size)
        return torch.cat([image, whole], dim=1)

    def from_map(self, x: Tensor) -> Tensor:
        width = x.shape[1] // (1 + self.prefix)
        image = x[:, :width].flatten(2).transpose(1, 2)
        if not self.prefix:
            return image
        whole = x[:, width:].mean(dim=(2, 3)).unflatten(1, (self.prefix, width))
        return torch.cat([whole, image], dim=1)


Layout = ChannelsLast | Tokens | None  # None: a map or a vector already


def find_layout(shape: Sequence[int], image_size: tuple[int, int], prefix: int | None = None) -> Layout:
    """How a feature of `shape` (without the batch dimension) becomes a map.

    Args:
        image_size: height and width of the images.
        prefix: how many tokens are about the whole image, if that is known.

    Raises:
        ValueError: it cannot; the text completes "the feature is ...".
    """
    if len(shape) == 1:
        return None
    if len(shape) == 3:
        return ChannelsLast() if _alike(shape[:2], image_size) and not _alike(shape[1:], image_size) else None
    if len(shape) == 2:
        for height, width in _grids(image_size):
            spare = shape[0] - height * width
            if spare >= 0 and (spare == prefix or (prefix is None and spare <= MOST_PREFIX_TOKENS)):
                return Tokens(spare, height, width)
            if spare >= 0 and prefix is None:
                break
    raise ValueError(f"of shape {tuple(shape)}, neither a vector nor a map nor tokens on a grid")


def prefix_tokens(network: nn.Module) -> int | None:
    """How many tokens of a transformer of timm are about the whole image; None of other networks."""
    number = getattr(network, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def _alike(sides: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Whether these are the sides of the image, divided by one number and rounded."""
    (height, width), (rows, columns) = image_size, sides
    return abs(rows * width - columns * height) <= max(image_size)


def _grids(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of patch grids, the finest first."""
    height, width = image_size
    return [(height // patch, width // patch) for patch in range(1, min(image_size) + 1)]
