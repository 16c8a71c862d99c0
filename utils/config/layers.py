"""Settings laid on top of each other: base files, the file itself, the command line. Each remembers its source."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

from utils.config.errors import Key
from utils.config.schema import Config
from utils.config.yaml_text import parse_yaml, read_yaml
from utils.errors import UserError
from utils.files import warn_once

COMMAND_LINE = "command line"
DROPS = ("lr_decay_epochs", "lr_agent_decay_epochs")
# Keys that count only where another one is absent.
FALLBACKS = {("training", "optimizer", "lr"): ("training", "lr"), ("kd_loss", "T"): ("kd_loss", "KD_T")}


@dataclass
class Layers:
    """Nested settings in layers; a later one wins.

    Attributes:
        name: the source that messages give for a key that no layer sets.
        parts: source and settings of each layer, the lowest first.
        note: one line for the log that says what was taken from where.
    """

    name: str
    parts: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    note: str = ""

    @property
    def data(self) -> dict[str, Any]:
        """The settings of all layers together."""
        return reduce(_merged, (data for _, data in self.parts), {})

    def config(self) -> Config:
        """What they amount to, checked.

        Where the command line sets ``training.epochs`` and not the drops of the learning rate, those of a file, or the
        usual ones, are scaled to the new length, which a line says.

        Raises:
            UserError: one line that names the file, the key, what was found and what would do.
        """
        data = self.data
        config = Config.from_dict(data, self.source)
        for key, other in FALLBACKS.items():
            where = self.source(other)
            is_typed = _holds(data, key) and self.source(key) == COMMAND_LINE != where
            if is_typed and _holds(data, other) and reduce(dict.get, key, data) != reduce(dict.get, other, data):
                first, second = ".".join(key), ".".join(other)
                raise UserError(f"{COMMAND_LINE}: {first} has no effect beside {second} in {where}; set that")
        training, typed = config.training, _training(self.parts, typed=True)
        before = _training(self.parts, typed=False).get("epochs")
        if not isinstance(before, int) or before <= 0:
            before = Config.model_fields["training"].default.epochs
        if "epochs" not in typed or before == training.epochs or training.schedule == "cosine":
            return config
        given = {name: getattr(training, name) for name in DROPS if name not in typed}
        if "lr_decay_epochs" in typed and self.data["training"].get("lr_agent_decay_epochs") is None:
            given.pop("lr_agent_decay_epochs", None)  # it follows the other
        factor = training.epochs / before
        scaled = {key: tuple(sorted({max(1, round(drop * factor)) for drop in drops})) for key, drops in given.items()}
        if changed := [key for key in scaled if scaled[key] != given[key]]:
            old, new = (list(drops[changed[0]]) for drops in (given, scaled))
            line = f"training.{changed[0]}: {new}, scaled from {old} of {before} epochs to {training.epochs}"
            warn_once(f"{self.name}: {line}")
        return config.model_copy(update={"training": training.model_copy(update=scaled)})

    def add(self, data: dict[str, Any], source: str) -> None:
        """Lay `data` on top; messages about its keys name `source`."""
        self.parts.append((source, data))

    def add_file(self, path: str | Path, chain: tuple[Path, ...] = ()) -> None:
        """Lay a file on top, its bases first.

        Args:
            path: the file.
            chain: the files whose ``base:`` led here, outermost first.

        Raises:
            UserError: the file or one of its bases cannot be read, or the bases go in a circle.
        """
        path = Path(os.path.normpath(path))
        if path.resolve() in map(Path.resolve, chain):
            raise UserError(f"base: goes in a circle ({' -> '.join(map(str, (*chain, path)))})")
        data = read_yaml(path)
        try:
            for base in _bases(data.pop("base", None)):
                self.add_file(path.parent / base, (*chain, path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        self.add(data, str(path))

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

    def load(self, overrides: Iterable[str] = ()) -> Config:
        """`config` under ``key=value`` words that win over everything else; the layers stay as they are."""
        layers = Layers(self.name, list(self.parts))
        layers.add_overrides(overrides)
        return layers.config()

    def source(self, key: Key) -> str:
        """The last layer that set `key`; for a key that nobody set, the last that set something around it."""
        while key:
            for source, data in reversed(self.parts):
                if _holds(data, key):
                    return source
            key = key[:-1]
        return self.name


def _merged(below: Any, above: Any) -> Any:
    if not isinstance(above, dict):
        # A heading with nothing under it changes nothing.
        return below if above is None and isinstance(below, dict) else above
    below = below if isinstance(below, dict) else {}
    return below | {name: _merged(below.get(name), value) for name, value in above.items()}


def _training(parts: list[tuple[str, dict[str, Any]]], *, typed: bool) -> dict[str, Any]:
    """The section ``training`` of the command line alone, or of all else."""
    section = reduce(_merged, (data for source, data in parts if (source == COMMAND_LINE) == typed), {}).get("training")
    return section if isinstance(section, dict) else {}


def _holds(data: Any, key: Key) -> bool:
    return not key or (isinstance(data, dict) and key[0] in data and _holds(data[key[0]], key[1:]))


def _bases(value: Any) -> list[str]:
    """The files that ``base: value`` names."""
    names = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"base: found {value!r}, must be a path or a list of paths")
    return names
