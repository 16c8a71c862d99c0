"""Average pooling to a given size."""

from __future__ import annotations

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
    return F.adaptive_avg_pool2d(feature, (height, width))
