"""Calling what makes a network: a function or class at an import path."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from utils.errors import UserError, doing


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
        UserError: it does not know one of the keyword arguments, fails, or makes something else.
    """
    with doing(f"calling it with {', '.join(['num_classes', *kwargs])}"):
        arguments = inspect.signature(factory)
        try:
            arguments.bind(num_classes=num_classes, **kwargs)
        except TypeError as error:
            raise UserError(f"{error}; its arguments are {', '.join(arguments.parameters)}") from error
        module = factory(num_classes=num_classes, **kwargs)
    if not isinstance(module, nn.Module):
        raise UserError(f"calling it gives a {type(module).__name__}, not a torch.nn.Module")
    return module
