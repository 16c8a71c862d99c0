"""What several distillers do to features before they compare them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.pooling import average_pool


def pool_to_match(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps ``[B, C, H, W]`` to the height and width of the smaller."""
    height, width = map(min, first.shape[2:], second.shape[2:])
    return average_pool(first, height, width), average_pool(second, height, width)


def attention(feature: Tensor) -> Tensor:
    """Where a map is active: its mean square over channels, as a unit vector; ``[B, C, H, W]`` to ``[B, HW]``."""
    return F.normalize(feature.square().mean(dim=1).flatten(1), dim=1)


def linear_embedding(shape: Sequence[int], width: int) -> nn.Sequential:
    """Linear map from features of `shape` (batch dimension left out), flattened, to vectors of `width`."""
    return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), width))
