"""What the losses share: masks for the chosen samples, precision, and a few things done to features.

A gate is a float vector ``[B]`` of zeros and ones. A loss over the chosen samples multiplies by it instead of gathering
them: gathering would make shapes depend on data, which costs a device sync at every gate and rules out CUDA graphs.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.pooling import average_pool


def masked_mean(per_sample: Tensor, gate: Tensor) -> Tensor:
    """Mean of `per_sample` over the ``n`` chosen samples, times ``n / B``; that is ``sum(gate * per_sample) / B``.

    Args:
        per_sample: one loss per sample, ``[B]``, finite everywhere.
        gate: ``[B]``, 1 where the sample is chosen. With none chosen the result is 0.
    """
    return (gate * per_sample).sum() / gate.shape[0]


def masked_pair_mean(per_pair: Tensor, gate: Tensor) -> Tensor:
    """Mean of `per_pair` over the ``n * n`` ordered pairs of chosen samples, times ``n / B``.

    Args:
        per_pair: one loss per pair, ``[B, B]``, finite everywhere.
        gate: ``[B]``, 1 where the sample is chosen. With none chosen the result is 0.
    """
    return gate @ per_pair @ gate / (chosen_count(gate) * gate.shape[0])


def chosen_count(gate: Tensor) -> Tensor:
    """Number ``n`` of chosen samples as a scalar to divide by: 1 if there is none."""
    return gate.sum().clamp_min(1)


def at_least(dtype: torch.dtype) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator: compute a loss in `dtype` or better, outside of autocast.

    All floating-point tensors among the positional arguments are brought to one type: `dtype`, or the widest
    among them if that is wider. Casting alone would not do: inside autocast a matrix product of float32 tensors
    still runs in half precision. The result is handed back in float32, or in float64 if an argument had that.
    """

    def decorate(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(loss)
        def in_full_precision(*args, **options) -> Tensor:
            floats = [arg for arg in args if _is_float(arg)]
            widest = functools.reduce(torch.promote_types, (x.dtype for x in floats), torch.float32)
            working = torch.promote_types(widest, dtype)
            with torch.autocast(floats[0].device.type, enabled=False):
                result = loss(*(arg.to(working) if _is_float(arg) else arg for arg in args), **options)
            return result.to(widest)

        return in_full_precision

    return decorate


def _is_float(argument: object) -> bool:
    return isinstance(argument, Tensor) and argument.is_floating_point()


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


for _name in ("masking", "precision", "features"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]  # the old names, until 2027-06
