"""Calling what makes a network: a function or class at an import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from utils.errors import UserError, doing

_UNKNOWN = "a_keyword_that_no_network_has"
_COMPARED_AS_TENSORS = ("_modules", "_parameters", "_buffers")


def locate(path: str) -> Callable[..., nn.Module]:
    """The callable at an import path. The current directory is searched as well.

    Raises:
        UserError: there is none.
    """
    if not {"", os.getcwd()}.intersection(sys.path):
        sys.path.append(os.getcwd())
    module_name, _, attribute = path.rpartition(".")
    with doing(f"importing {module_name!r}, installed or in this directory,"):
        module = importlib.import_module(module_name)
    if not callable(getattr(module, attribute, None)):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(attribute, known) or known[:12]
        raise UserError(f"{module_name!r} has no class or function {attribute!r}; it has {', '.join(close) or 'none'}")
    return getattr(module, attribute)


def call_factory(factory: Callable[..., nn.Module], num_classes: int, kwargs: dict[str, Any]) -> nn.Module:
    """The network that `factory` makes.

    Raises:
        UserError: it fails, makes something else, or pays no attention to one of the keyword arguments. The last is
            said of a keyword only if it disappears in the factory's ``**kwargs``, any other word is accepted there,
            too, and the network without it is the same to the last weight and attribute.
    """
    random_state = torch.get_rng_state()
    with doing(f"calling it with {', '.join(['num_classes', *kwargs])}"):
        module = factory(num_classes=num_classes, **kwargs)
    if not isinstance(module, nn.Module):
        raise UserError(f"calling it gives a {type(module).__name__}, not a torch.nn.Module")

    def again(kwargs: dict[str, Any]) -> nn.Module | None:
        """What `factory` makes of others; None if it refuses them."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(random_state)
            try:
                return factory(num_classes=num_classes, **kwargs)
            except Exception:
                return None

    unnamed = kwargs.keys() - _parameters(factory)
    if unnamed and again({**kwargs, _UNKNOWN: 1}) is not None:
        for key in sorted(unnamed):
            without = again({name: value for name, value in kwargs.items() if name != key})
            if without is not None and _identical(module, without):
                raise UserError(
                    f"kwargs: {key!r} has no effect: unknown keywords are ignored, and the network is the same without "
                    "this one; leave it out or check its spelling"
                )
    return module


def _parameters(factory: Callable) -> set[str]:
    """Names of its parameters; none if Python does not know them."""
    try:
        return set(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # not written in Python
        return set()


def _identical(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks agree in everything that can be compared; what cannot counts as different."""
    try:
        return all(
            name == other_name and type(part) is type(other_part) and _same_content(part, other_part)
            for (name, part), (other_name, other_part) in zip_longest(one.named_modules(), other.named_modules())
        )
    except Exception:  # of another's code, for example of an attribute that has no ==
        return False


def _same_content(part: nn.Module, other: nn.Module) -> bool:
    attributes, other_attributes = (
        {name: value for name, value in vars(m).items() if name not in _COMPARED_AS_TENSORS} for m in (part, other)
    )
    tensors, other_tensors = ({**m._parameters, **m._buffers} for m in (part, other))
    return (
        attributes == other_attributes
        and tensors.keys() == other_tensors.keys()
        and all(
            value is other_tensors[name] or torch.equal(value, other_tensors[name]) for name, value in tensors.items()
        )
    )
