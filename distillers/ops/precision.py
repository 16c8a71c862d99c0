"""Losses keep their precision, whatever the networks run in."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor


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
