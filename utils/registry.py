"""Names that stand for classes or functions: models, distillers, data sources."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from utils.errors import UserError

T = TypeVar("T", bound=Callable)


class Registry(Generic[T]):
    """Entries register themselves by decorator; looking one up forgives case, dashes and underscores.

    Args:
        kind: what an entry is called in messages, e.g. ``"model"``.
        package: the package whose modules are imported before the first look-up, so that putting a
            file there is all it takes to add an entry.
    """

    def __init__(self, kind: str, package: str):
        self.kind = kind
        self.package = package
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: file the decorated class or function under each of `names`."""

        def add(entry: T) -> T:
            for name in names:
                if name in self._entries:
                    raise ValueError(f"{self.kind} {name!r} is registered twice")
                self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry called `name`.

        Raises:
            UserError: there is none; the line names the closest and all that exist.
        """
        return self._entries[self.canonical(name)]

    def canonical(self, name: str) -> str:
        """The registered spelling of `name`, e.g. ``"tiny-imagenet"`` for ``"Tiny_ImageNet"``."""
        self._load()
        if name in self._entries:
            return name
        # Model names differ by case alone (resnet110, ResNet101), so an inexact match must be the only one.
        matches = [known for known in self._entries if _fold(known) == _fold(name)]
        if len(matches) == 1:
            return matches[0]
        close = difflib.get_close_matches(name, self._entries, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"unknown {self.kind} {name!r}: {hint}known are {', '.join(self._entries)}")

    def __contains__(self, name: str) -> bool:
        try:
            self.canonical(name)
        except UserError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self.package)
            for module in pkgutil.iter_modules(package.__path__):
                importlib.import_module(f"{self.package}.{module.name}")


def _fold(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
