"""Strict YAML: plain mappings, lists and scalars, and a one-line error for everything else.

Scalars follow YAML 1.2 rather than PyYAML's 1.1: ``5e-4`` is a number, ``on`` and ``off`` are words and
``1:30`` is no base-60 integer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from utils.config.wording import closest, show
from utils.errors import UserError

MAX_BYTES = 1_000_000
"""A config is a page of text; whatever is larger is another kind of file."""

_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}


class _Loader(yaml.SafeLoader):
    """Refuses what a config does not need and what makes one hard to read or unsafe to load."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 - filled below; the parent's would bring YAML 1.1 back

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _problem("anchors and aliases are not read here; share keys between files with `base:`", event)
        if event.tag is not None:
            raise _problem(f"the tag {event.tag} is not read here; write plain values", event)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _problem(f"found {show(key)} as a key; keys are words", key_node)
            if key in mapping:
                raise _problem(f"the key {show(key)} stands here a second time", key_node)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


for _kind, (_pattern, _first) in _SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
_Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))
_Loader.add_constructor("tag:yaml.org,2002:map", lambda loader, node: loader.construct_mapping(node))


def parse_yaml(text: str) -> Any:
    """The one value that `text` spells.

    Raises:
        UserError: the text is not YAML of the accepted kind; the line gives the place but no file.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        raise UserError(_describe(error)) from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"not YAML: character {error.character!r} at position {error.position}") from None
    except RecursionError:
        raise UserError("nested too deeply to be a config") from None
    except ValueError as error:  # Python reads no integers of thousands of digits
        raise UserError(f"not YAML: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that the file `path` holds.

    Raises:
        UserError: no such file, unreadable, too large, not UTF-8, not YAML, empty, or not a mapping.
    """
    try:
        data = parse_yaml(_read_text(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if data is None:
        raise UserError(f"{path}: the file is empty; it needs keys such as dataset: and model:")
    if not isinstance(data, dict):
        raise UserError(f"{path}: found {show(data)} at the top, must be `key: value` lines")
    return data


def no_such_file(path: Path) -> str:
    """``"no such file"``, with the existing path that is closest to `path`."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = [p.name for p in missing.parent.iterdir()] if missing.parent.is_dir() else []
    close = closest(missing.name, siblings)
    return "no such file" + (f" (did you mean {missing.parent / close}?)" if close else "")


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise UserError(no_such_file(path)) from None
    except IsADirectoryError:
        raise UserError("this is a folder; name a .yml file in it") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(raw) > MAX_BYTES:
        raise UserError(f"larger than {MAX_BYTES:,} bytes; this is not a config")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None


def _problem(text: str, place: yaml.Event | yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=place.start_mark)


def _describe(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
    if error.problem and "'\\t'" in error.problem:
        return f"{place}found a tab; YAML is indented with spaces"
    return f"{place}{error.problem or error.context}"
