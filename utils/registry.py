"""Names that stand for classes or functions: networks, distillers, policies, losses at the logits, data sources."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Generic, TypeVar

from utils.errors import UserError, did_you_mean, doing

T = TypeVar("T", bound=Callable)


class Registry(Generic[T]):
    """Entries register themselves by decorator; looking one up forgives case, dashes and underscores.

    Args:
        kind: what an entry is called in messages, e.g. ``"model"``.
        package: the package whose modules are imported before the first look-up, so that putting a
            file there is all it takes to add an entry.
        more: further modules that register entries.
    """

    def __init__(self, kind: str, package: str, *more: str):
        self.kind = kind
        self.package, self.more = package, more
        self._entries: dict[str, T] = {}
        self._loaded = False

    def register(self, *names: str) -> Callable[[T], T]:
        """Decorator: file the decorated class or function under each of `names`."""

        def add(entry: T) -> T:
            for name in names:
                if same := spelling(name, self._entries):
                    where = self._entries[same].__module__
                    raise ValueError(f"{self.kind} {name!r} is registered twice, also as {same!r} in {where}")
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
        if known := spelling(name, self._entries):
            return known
        close = did_you_mean(name, self._entries) or ":"
        raise UserError(f"unknown {self.kind} {name!r}{close} known are {', '.join(self._entries)}")

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(self._entries)

    def _load(self) -> None:
        if not self._loaded:
            self._loaded = True
            package = importlib.import_module(self.package)
            modules = [f"{self.package}.{module.name}" for module in pkgutil.iter_modules(package.__path__)]
            for module in (*modules, *self.more):
                with doing(f"importing {module}"):
                    importlib.import_module(module)


@cache
def names_in_source(package: str, kind: str = r"\w+") -> tuple[str, ...]:
    """Names that the modules of `package` register by the decorator ``register_<kind>``, read off their source.

    So help texts and configs know them without importing the modules, which bring PyTorch. What is registered in
    another way, or elsewhere, only the registry itself knows.
    """
    names: list[str] = []
    for folder in importlib.util.find_spec(package).submodule_search_locations:
        for file in sorted(Path(folder).rglob("[!.]*.py")):  # editors and systems leave hidden ones
            text = file.read_text(encoding="utf-8")
            for arguments in re.findall(rf"^@register_{kind}(\(.*\))$", text, re.MULTILINE):
                with suppress(ValueError, SyntaxError):  # a constant, say
                    names += ast.literal_eval(f"[{arguments[1:-1]}]")
    return tuple(names)


def spelling(name: str, known: Iterable[str]) -> str | None:
    """The one of `known` that differs from `name` in case, dashes and underscores at most; None if there is none."""
    return next((one for one in known if fold(one) == fold(name)), None)


def fold(name: str) -> str:
    """`name` in lower case, without dashes and underscores."""
    return name.lower().replace("-", "").replace("_", "")
