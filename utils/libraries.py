"""Networks of timm and torchvision: their names, and the keyword arguments that ask for weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TIMM = "timm/"


def is_timm(name: str) -> bool:
    """Whether it is a network of timm, e.g. ``timm/resnet34.a1_in1k``."""
    return name.startswith(TIMM)


def weights_key(name: str) -> str | None:
    """The keyword argument of the network called `name` that asks for weights, which are loaded after it is built."""
    if is_timm(name):
        return "pretrained"
    return "weights" if f"{name.rpartition('.')[0]}.".startswith("torchvision.models.") else None


def without_weights(name: str, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`kwargs` without the one that asks for weights."""
    return {key: value for key, value in kwargs.items() if key != weights_key(name)}
