"""The Python side of the stand-in for a GPU: its records, and patches that let a training go on on garbage values.

Importing this changes nothing, see README.md.
"""

from __future__ import annotations

import ctypes
import json
import math
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

    from utils.training import engine, snapshot
    from utils.training.meter import Meter

    torch.backends.cudnn.enabled = False
    means = Meter.means
    # The engine ends a run whose losses or weights are not finite.
    engine.not_finite = lambda tensors: []
    Meter.means = lambda self: {name: value if math.isfinite(value) else 0.0 for name, value in means(self).items()}
    # A repetition computes nothing, whereas an eager step copies.
    snapshot.distance = lambda found, expected, was: 0.0
