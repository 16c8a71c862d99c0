"""What one training step leaves to the next: remembered, put back, and compared."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.training.device import rng_state, set_rng_state

# Kernels that add in no fixed order round differently each time. As a share of what a step changes.
TOLERANCE = 1e-3

# Generators of the host: how their states are read and set. Equal states are equal bytes to `pickle`.
HOST_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "Python's random": (random.getstate, random.setstate),
    "NumPy's global generator": (np.random.get_state, np.random.set_state),
    "PyTorch's CPU generator": (
        lambda: torch.get_rng_state().numpy(),
        lambda state: torch.set_rng_state(torch.from_numpy(state)),
    ),
}


class Place(NamedTuple):
    """A dictionary of attributes that a step may change.

    Attributes:
        group: name of what they belong to; the tensors of one group are compared together.
        attributes: by name. Only tensors and numbers count.
        rows: if the entries of a vector are different quantities, their names; each of them is compared alone.
        apart: tensors of different names are different quantities, and not compared together.
    """

    group: str
    attributes: dict[str, Any]
    rows: Sequence[str] = ()
    apart: bool = False

    def values(self) -> dict[str, Any]:
        """The tensors and numbers."""
        return {name: value for name, value in self.attributes.items() if isinstance(value, Tensor | int | float)}


class Snapshot:
    """The tensors and numbers in some places as they are now, and the states of all random generators.

    Args:
        places: where a step leaves something to the next.
        device: where the tensors are; its generator counts as well.
    """

    def __init__(self, places: Iterable[Place], device: torch.device):
        self._device = device
        self._places = [(place, place.values()) for place in places]
        # On the host: memory of the device is scarce.
        self._copies = {id(tensor): (tensor, on_host(tensor)) for _, _, tensor in self._tensors()}
        self._random = rng_state(device)
        self._host = {name: read() for name, (read, _) in HOST_GENERATORS.items()}

    def _tensors(self) -> Iterator[tuple[Place, str, Tensor]]:
        for place, values in self._places:
            yield from ((place, name, value) for name, value in values.items() if isinstance(value, Tensor))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; values of tensors in place, since the student's frozen twin and graphs hold them too."""
        for place, values in self._places:
            place.attributes.update(values)
        for tensor, copy in self._copies.values():
            tensor.copy_(copy)
        set_rng_state(self._random, self._device)
        for name, state in self._host.items():
            HOST_GENERATORS[name][1](state)

    def find_replaced(self) -> str:
        """A clause about an attribute that is another tensor or number now; empty if there is none.

        A captured step would go on with the one that was there when it was captured.
        """
        for place, values in self._places:
            now = place.values()
            for name in values | now:
                if name not in values or name not in now or not _same(values[name], now[name]):
                    what = f"{name} of {place.group}"
                    return f"{what} is replaced at every step; only what is written in place can be captured"
        return ""

    def find_host_draws(self) -> str:
        """A clause about a generator of the host that has been drawn from since; empty if there is none.

        A captured step would repeat the numbers that were drawn when it was captured.
        """
        for name, state in self._host.items():
            is_the_devices = self._device.type == "cpu" and name == "PyTorch's CPU generator"
            if not is_the_devices and pickle.dumps(HOST_GENERATORS[name][0]()) != pickle.dumps(state):
                return f"it draws from {name}, and a captured step would draw the same numbers again and again"
        return ""

    def find_other_draws(self) -> str:
        """A clause if the device's generator is not where it was here."""
        name = self._device.type
        same = torch.equal(rng_state(self._device)[name], self._random[name])
        return "" if same else "a repetition draws another amount of random numbers"

    def find_difference(self, before: Snapshot) -> str:
        """A clause about tensors whose values are not those of this snapshot, rounding aside; empty if there are none.

        Args:
            before: of the time before the step that ended here; differences are measured by what that step changed.
        """
        groups: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)
        for place, own_name, tensor in self._tensors():
            expected = self._copies[id(tensor)][1]
            _, was = before._copies.get(id(tensor), (tensor, torch.zeros_like(expected)))
            values = (on_host(tensor), expected, was)
            if place.rows and tensor.shape == (len(place.rows),):
                for name, *row in zip(place.rows, *values):
                    groups[own_name, name].append(tuple(row))
            else:
                groups["", f"{own_name} of {place.group}" if place.apart else place.group].append(values)
        for (_, group), tensors in groups.items():
            if not is_close(*zip(*tensors)):
                return f"a repetition leaves other values in {group}"
        return ""


def is_close(found: Iterable[Tensor], expected: Iterable[Tensor], was: Iterable[Tensor]) -> bool:
    """Whether `found` is `expected` but for rounding: each a list of tensors, taken as one vector.

    The distance may be `TOLERANCE` of that from `was`, plus what rounding the sum of the old value and the change
    makes. Entries that should not be finite are left out: a run ends when it finds them.
    """
    error = change = size = 0.0
    for a, b, c in zip(found, expected, was, strict=True):
        a, b, c = (torch.where(b.isfinite(), tensor, 0).double() for tensor in (a, b, c))
        error += (a - b).square().sum().item()
        change += (b - c).square().sum().item()
        size += b.square().sum().item()
    return error**0.5 <= TOLERANCE * change**0.5 + 1e-6 * size**0.5


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _same(first: Any, second: Any) -> bool:
    """The same tensor, or equal numbers."""
    if isinstance(first, Tensor) or isinstance(second, Tensor):
        return first is second
    return first == second
