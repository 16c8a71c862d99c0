"""Average pooling to a given size."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def average_pool(feature: Tensor, height: int, width: int) -> Tensor:
    """Average-pool a map ``[B, C, H, W]`` to `height` x `width`, neither larger than what it has."""
    rows, columns = feature.shape[2:]
    if (rows, columns) == (height, width):
        return feature
    if rows % height == 0 and columns % width == 0:
        # The same numbers as adaptive pooling, which is slower and has no deterministic gradient on a GPU.
        return F.avg_pool2d(feature, (rows // height, columns // width))
    return adaptive_average_pool(feature, height, width)


def adaptive_average_pool(feature: Tensor, height: int, width: int) -> Tensor:
    """``F.adaptive_avg_pool2d``, on a GPU with a reproducible gradient if PyTorch is told to be deterministic."""
    deterministic = feature.is_cuda and torch.are_deterministic_algorithms_enabled()
    return pool_windows(feature, height, width) if deterministic else F.adaptive_avg_pool2d(feature, (height, width))


def pool_windows(feature: Tensor, height: int, width: int) -> Tensor:
    """Average pooling by ``height + width`` means of slices. It is slower and rounds differently."""
    for dim, count in ((2, height), (3, width)):
        size = feature.shape[dim]
        bounds = [(k * size // count, -(-(k + 1) * size // count)) for k in range(count)]
        means = [feature.narrow(dim, start, end - start).mean(dim, keepdim=True) for start, end in bounds]
        feature = torch.cat(means, dim)
    return feature
