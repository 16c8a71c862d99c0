"""The Python side of the stand-in for a GPU: its records, and patches that let a training go on on garbage values.

Importing this changes nothing, see README.md.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import math
import sys
from collections.abc import Callable
from typing import Any

_library = ctypes.CDLL(None)


def stats() -> dict[str, Any]:
    """What has happened since the start or the last `reset`.

    Returns:
        ``launches`` (kernels, copies and memsets, captured ones included), ``graph_launches``, ``h2d``, ``d2h``;
        ``bytes`` and ``peak``: what the allocator has reserved, per device; ``violations``: broken rules, as text;
        ``outside``: kernels launched outside a capture while it was under way, with their numbers; ``nccl``: calls in
        order.
    """
    _library.fakecuda_stats.restype = ctypes.c_char_p
    return json.loads(_library.fakecuda_stats())


def reset() -> None:
    """Forget counts and violations; the peak becomes what is reserved now."""
    _library.fakecuda_reset()


def patch() -> None:
    """Turn cuDNN off, which does not run without a GPU, and replace what makes decisions by values on the device."""
    import torch

    torch.backends.cudnn.enabled = False
    for module, name, change in PATCHES:
        owner = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, last)
        changed = change(original)
        setattr(owner, last, staticmethod(changed) if isinstance(vars(owner)[last], staticmethod) else changed)
        for other in list(sys.modules.values()):  # those that have imported it by name
            if vars(other).get(last) is original:
                setattr(other, last, changed)


def _rate_on_the_device(init: Callable) -> Callable:
    """An optimiser compares its learning rate with 0."""

    @functools.wraps(init)
    def patched(self, params, lr=1e-3, *args, **kwargs):
        rate = lr if getattr(lr, "is_cuda", False) else None
        init(self, params, lr if rate is None else 1e-3, *args, **kwargs)
        if rate is not None:
            self.defaults["lr"] = rate
            for group in self.param_groups:
                group["lr"] = rate

    return patched


def _all_finite(not_finite: Callable) -> Callable:
    """The engine ends a run whose weights are not finite."""
    return lambda tensors: []


def _finite_means(means: Callable) -> Callable:
    """The same for losses."""

    @functools.wraps(means)
    def patched(self):
        return {name: value if math.isfinite(value) else 0.0 for name, value in means(self).items()}

    return patched


def _no_distance(distance: Callable) -> Callable:
    """A repetition computes nothing, whereas an eager step copies."""
    return lambda found, expected, was: 0.0


PATCHES = [
    ("torch.optim", "SGD.__init__", _rate_on_the_device),
    ("utils.training.meter", "not_finite", _all_finite),
    ("utils.training.meter", "Meter.means", _finite_means),
    ("utils.training.snapshot", "distance", _no_distance),
]
