"""Settings laid on top of each other: base files, the file itself, the command line. Each remembers its source."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from utils.config.errors import Key
from utils.config.yaml_text import parse_yaml, read_yaml
from utils.errors import UserError

COMMAND_LINE = "command line"


class Layers:
    """A nested mapping that grows layer by layer; a later layer wins.

    Attributes:
        data: the settings of all layers so far.
        name: the source that messages give for a key that no layer sets.
    """

    def __init__(self, name: str):
        self.data: dict[str, Any] = {}
        self.name = name
        self._sources: dict[Key, str] = {}
        self._files: dict[Path, Layers] = {}

    def add(self, data: dict[str, Any], source: str) -> None:
        """Lay `data` on top; messages about its keys name `source`."""
        self._merge(self.data, data, lambda key: source, ())

    def add_file(self, path: str | Path) -> None:
        """Lay a file on top, its bases first.

        Raises:
            UserError: the file or one of its bases cannot be read, or the bases go in a circle.
        """
        self._add_layers(self._read(Path(os.path.normpath(path)), ()))

    def _read(self, path: Path, chain: tuple[Path, ...]) -> Layers:
        """The file `path` on top of its bases, read once, however often it is named.

        Args:
            chain: the files whose ``base:`` led here, outermost first.
        """
        known = path.resolve()
        if known in map(Path.resolve, chain):
            raise UserError(f"base: goes in a circle ({' -> '.join(map(str, (*chain, path)))})")
        if known not in self._files:
            data, layers = read_yaml(path), Layers(str(path))
            try:
                for base in _bases(data.pop("base", None)):
                    layers._add_layers(self._read(Path(os.path.normpath(path.parent / base)), (*chain, path)))
            except UserError as error:
                raise UserError(f"{path}: {error}") from None
            layers.add(data, str(path))
            self._files[known] = layers
        return self._files[known]

    def _add_layers(self, other: Layers) -> None:
        self._merge(self.data, other.data, other.source, ())

    def add_overrides(self, overrides: Iterable[str]) -> None:
        """Lay ``key=value`` words of the command line on top, e.g. ``"training.epochs=10"``."""
        for word in overrides:
            key, equals, text = word.partition("=")
            if not equals or not key:
                raise UserError(f"{COMMAND_LINE}: found {word!r}, must be key=value, e.g. training.epochs=10")
            try:
                value = parse_yaml(text)
            except UserError as error:
                raise UserError(f"{COMMAND_LINE}: {word[:60]}: {error}") from None
            for part in reversed(key.split(".")):
                value = {part: value}
            self.add(value, COMMAND_LINE)

    def copy(self) -> Layers:
        """Independent of this one from here on."""
        return copy.deepcopy(self)

    def source(self, key: Key) -> str:
        """Who set `key`; for a key that nobody set, who set the section around it."""
        while key:
            if key in self._sources:
                return self._sources[key]
            key = key[:-1]
        return self.name

    def _merge(self, below: dict[str, Any], above: dict[str, Any], source: Callable[[Key], str], path: Key) -> None:
        for name, value in above.items():
            here = (*path, name)
            is_section = isinstance(below.get(name), dict)
            if value is None and is_section:
                continue  # a heading with nothing under it changes nothing
            self._sources[here] = source(here)
            if isinstance(value, dict):
                if not is_section:
                    below[name] = {}
                self._merge(below[name], value, source, here)
            else:
                below[name] = value


def _bases(value: Any) -> list[str]:
    """The files that ``base: value`` names."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"base: found {value!r}, must be a path or a list of paths")
    return names
