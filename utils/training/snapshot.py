"""What one training step leaves to the next: a snapshot of it can be restored, and compared with what is there now."""

from __future__ import annotations

import pickle
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.training.device import rng_state, set_rng_state

ROUNDING = 1e-6  # of a value, from adding a change to it

# Generators of the host: how their states are read and set. Equal states are equal bytes to `pickle`.
HOST_GENERATORS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "Python's random": (random.getstate, random.setstate),
    "NumPy's global generator": (np.random.get_state, np.random.set_state),
    "PyTorch's CPU generator": (
        lambda: torch.get_rng_state().numpy(),
        lambda state: torch.set_rng_state(torch.from_numpy(state)),
    ),
}


class Holder(NamedTuple):
    """A dictionary of tensors and numbers that a step may change, such as the attributes of a module.

    Attributes:
        group: name of what they belong to, for messages.
        attributes: by name. Only tensors and numbers count.
        rows: names of the entries of a vector, if they are to be compared one by one.
        apart: tensors of different names are to be compared one by one.
    """

    group: str
    attributes: dict[str, Any]
    rows: Sequence[str] = ()
    apart: bool = False

    def values(self) -> dict[str, Any]:
        """The tensors and numbers."""
        return {name: value for name, value in self.attributes.items() if isinstance(value, Tensor | int | float)}

    def quantities(self, name: str, tensor: Tensor) -> dict[tuple[str, str], Tensor]:
        """The parts of a tensor that are to be compared one by one, by a key whose last part is their name."""
        if self.rows and tensor.shape == (len(self.rows),):
            return {(name, row): value for row, value in zip(self.rows, tensor)}
        return {("", f"{name} of {self.group}" if self.apart else self.group): tensor}


class Snapshot:
    """The tensors and numbers of some holders as they are now, and the states of all random generators.

    Args:
        holders: of everything that a step leaves to the next.
        device: where the tensors are; its generator counts as well.
    """

    def __init__(self, holders: Iterable[Holder], device: torch.device):
        self._device = device
        self._holders = [(holder, holder.values()) for holder in holders]
        tensors = (value for _, values in self._holders for value in values.values() if isinstance(value, Tensor))
        self._copies = {id(tensor): (tensor, on_host(tensor)) for tensor in tensors}  # the device's memory is scarce
        self._random = rng_state(device)
        self._host = {name: read() for name, (read, _) in HOST_GENERATORS.items()}

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back; values of tensors in place, since the student's frozen twin and graphs hold them too."""
        for holder, values in self._holders:
            holder.attributes.update(values)
        for tensor, copy in self._copies.values():
            tensor.copy_(copy)
        set_rng_state(self._random, self._device)
        for name, state in self._host.items():
            HOST_GENERATORS[name][1](state)

    def find_replaced(self) -> str:
        """A clause about an attribute that is another tensor or number now; empty if there is none.

        A captured step would go on with the tensor or number that was there when it was captured.
        """
        for holder, values in self._holders:
            now = holder.values()
            for name in values | now:
                old, new = values.get(name), now.get(name)
                if old is not new and (isinstance(old, Tensor) or isinstance(new, Tensor) or old != new):
                    what = f"{name} of {holder.group}"
                    return f"{what} is replaced at every step; only what is written in place can be captured"
        return ""

    def find_host_draws(self) -> str:
        """A clause about a generator of the host that was used since the snapshot; empty if there is none.

        A captured step would repeat the numbers that were drawn when it was captured.
        """
        for name, state in self._host.items():
            is_the_devices = self._device.type == "cpu" and name == "PyTorch's CPU generator"
            if not is_the_devices and pickle.dumps(HOST_GENERATORS[name][0]()) != pickle.dumps(state):
                return f"it draws from {name}, and a captured step would draw the same numbers again and again"
        return ""

    def find_other_draws(self) -> str:
        """A clause if the device's generator is in another state than in the snapshot; empty if it is not."""
        name = self._device.type
        same = torch.equal(rng_state(self._device)[name], self._random[name])
        return "" if same else "a repetition draws another amount of random numbers"

    def distances(self, before: Snapshot) -> dict[tuple[str, str], float]:
        """How far each quantity is now from the snapshot, as a share of what the step before the snapshot changed.

        Args:
            before: the snapshot before that step.
        """
        groups: dict[tuple[str, str], list[tuple[Tensor, ...]]] = defaultdict(list)
        for holder, values in self._holders:
            for name, tensor in values.items():
                if isinstance(tensor, Tensor):
                    _, expected = self._copies[id(tensor)]
                    _, was = before._copies.get(id(tensor), (tensor, torch.zeros_like(expected)))
                    columns = [holder.quantities(name, value) for value in (on_host(tensor), expected, was)]
                    for quantity in columns[0]:
                        groups[quantity].append(tuple(column[quantity] for column in columns))
        return {quantity: distance(*zip(*tensors)) for quantity, tensors in groups.items()}


def distance(found: Iterable[Tensor], expected: Iterable[Tensor], was: Iterable[Tensor]) -> float:
    """Distance of `found` from `expected`, divided by that of `was`. Each is a list of tensors, taken as one vector.

    The rounding of the sum of the old value and the change is subtracted. Entries that are not finite in `expected` are
    left out: a run ends when it finds them.
    """
    error = change = size = 0.0
    for a, b, c in zip(found, expected, was, strict=True):
        a, b, c = (torch.where(b.isfinite(), tensor, 0).double() for tensor in (a, b, c))
        error += (a - b).square().sum().item()
        change += (b - c).square().sum().item()
        size += b.square().sum().item()
    excess = error**0.5 - ROUNDING * size**0.5
    if excess <= 0:
        return 0.0
    return excess / change**0.5 if change else float("inf")


def on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)
