"""What one training step leaves to the next: a snapshot of it can be restored, and compared with what is there now."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.training.device import rng_state, set_rng_state

ROUNDING = 1e-6  # of a value, from adding a change to it
PARAMETERS = "the parameters"

# The name of something, and a dictionary of tensors and numbers that a step may change, such as its attributes.
Holder = tuple[str, dict[str, Any]]


class Snapshot:
    """The tensors and numbers of some holders as they are now, and the states of all random generators.

    Args:
        holders: of everything that a step leaves to the next.
        device: where the tensors are; its generator counts as well.
    """

    def __init__(self, holders: Iterable[Holder], device: torch.device):
        self._device = device
        self._holders = [(group, attributes, _values(attributes)) for group, attributes in holders]
        # The device's memory is scarce.
        self._copies = {id(tensor): (tensor, on_host(tensor)) for _, _, tensor in self._tensors()}
        self._random = rng_state(device)
        self._host = host_states(device)

    def _tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """Group, name and tensor."""
        for group, _, values in self._holders:
            yield from ((group, name, value) for name, value in values.items() if isinstance(value, Tensor))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; values of tensors in place, since the student's frozen twin and graphs hold them too."""
        for _, attributes, values in self._holders:
            attributes.update(values)
        for tensor, copy in self._copies.values():
            tensor.copy_(copy)
        set_rng_state(self._random, self._device)
        random.setstate(self._host["Python's random"])
        np.random.set_state(self._host["NumPy's global generator"])  # noqa: NPY002

    def find_obstacle(self) -> str:
        """A clause about an attribute that is another tensor or number now, or a generator of the host that was used.

        A captured step would go on with the tensor, or repeat the numbers, of its capture. Empty if there is none.
        """
        for group, attributes, values in self._holders:
            now = _values(attributes)
            for name in values | now:
                old, new = values.get(name), now.get(name)
                if old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new):
                    return f"{name} of {group} is replaced at every step; only what is written in place can be captured"
        for name, state in host_states(self._device).items():
            if pickle.dumps(state) != pickle.dumps(self._host[name]):
                return f"it draws from {name}, and a captured step would draw the same numbers again and again"
        return ""

    def distances(self, before: Snapshot) -> dict[str, float]:
        """How far everything is now from the snapshot, as a share of what the step before the snapshot changed.

        Args:
            before: the snapshot before that step.

        Returns:
            by name; the parameters count as one vector, since the gradients of some are nothing but rounding.
        """
        found: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
        for group, name, tensor in self._tensors():
            _, expected = self._copies[id(tensor)]
            _, was = before._copies.get(id(tensor), (tensor, torch.zeros_like(expected)))
            title = group if group.endswith(PARAMETERS) else f"{name} of {group}"
            found[title].append((on_host(tensor), expected, was))
        now, expected = (state[self._device.type] for state in (rng_state(self._device), self._random))
        found["the device's random generator"].append((now, expected, expected))  # any difference is too much
        return {title: distance(*zip(*tensors)) for title, tensors in found.items()}


def distance(found: Iterable[Tensor], expected: Iterable[Tensor], was: Iterable[Tensor]) -> float:
    """Distance of `found` from `expected`, divided by that of `was`. Each is a list of tensors, taken as one vector.

    The entries of a float64 tensor are sums of different things, so each counts by itself and the worst one is taken.
    The rounding of the sum of the old value and the change is subtracted. Entries that are not finite in `expected` are
    left out: a run ends when it finds them.
    """
    total, shares = torch.zeros(3, dtype=torch.float64), []
    for a, b, c in zip(found, expected, was, strict=True):
        old, new, now = (torch.where(b.isfinite(), tensor, 0).double().flatten() for tensor in (c, b, a))
        squares = torch.stack([now - new, new - old, new]).square()
        if b.dtype == torch.float64:
            shares.append(_share(*squares))
        else:
            total += squares.sum(dim=1)
    return torch.cat([*shares, _share(*total[:, None])]).max().item()


def _share(error: Tensor, change: Tensor, size: Tensor) -> Tensor:
    excess = error.sqrt() - ROUNDING * size.sqrt()
    return torch.where(excess <= 0, 0.0, excess / change.sqrt())


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def host_states(device: torch.device) -> dict[str, Any]:
    """The states of the generators that a captured step on `device` cannot draw from, by their names."""
    states = {"Python's random": random.getstate(), "NumPy's global generator": np.random.get_state()}  # noqa: NPY002
    return states if device.type == "cpu" else states | {"PyTorch's CPU generator": torch.get_rng_state().numpy()}


def _values(attributes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if isinstance(value, Tensor | int | float)}
