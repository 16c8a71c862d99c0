"""YAML as configs use it, read and written: a key may stand once, and scalars follow YAML 1.2.

PyYAML itself follows YAML 1.1, where ``5e-4`` is a word, ``on`` and ``off`` are truth values and ``1:30`` is a base-60
integer, and of two equal keys it silently takes the last.
"""

from __future__ import annotations

import copy
import math
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError, did_you_mean, doing, reason
from utils.files import check_regular

# Of the kinds of scalar that YAML 1.2 writes otherwise than PyYAML: the pattern, and which letters it begins with.
_SCALARS = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+", list("-+0123456789")),
    "float": (r"[-+]?(\.[0-9]+|[0-9]+\.?[0-9]*)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
}
_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    # The parent's resolvers would bring YAML 1.1 back; its constructors sets, dates and bytes, which no config needs.
    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    yaml_constructors = {  # noqa: RUF012
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (None, *(_TAG + kind for kind in ("null", "bool", "str", "seq", "map")))
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):  # a page of them stands for a text longer than any memory
            problem = "aliases are not read here; share keys between files with `base:`"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        mapping, seen = super().construct_mapping(node, deep=True), set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                problem = f"the key {key!r} stands here a second time"
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
            seen.add(key)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes words that are numbers in YAML 1.2, such as ``7e12``, as well as those of YAML 1.1."""


for _kind, (_pattern, _first) in _SCALARS.items():
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})\Z"), _first)
_Loader.add_constructor(_TAG + "int", lambda loader, node: int(loader.construct_scalar(node)))
_Loader.add_constructor(_TAG + "float", lambda loader, node: float(loader.construct_scalar(node)))


def parse_yaml(text: str | bytes) -> Any:
    """The one value that `text` spells, in UTF-8 or UTF-16.

    Raises:
        UserError: the text is not YAML of the accepted kind; the line gives the place but no file.
    """
    try:
        return copy.deepcopy(_load(text))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(place + (error.problem or error.context)) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # integers of thousands of digits, deep nesting
        raise UserError(f"not YAML: {reason(error)}") from None


@lru_cache(maxsize=512)  # the configs of a grid share their files, and PyYAML takes 10 ms for each
def _load(text: str | bytes) -> Any:
    return yaml.load(text, Loader=_Loader)


def dump_yaml(value: Any) -> str:
    """Text that `parse_yaml`, and a reader of YAML 1.1, read as `value`: plain dicts, lists and scalars."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False)


def spell(value: Any) -> str:
    """`value` as it stands behind ``key=`` on a command line, without quotation marks where that is possible."""
    text = yaml.dump(
        value, Dumper=_Dumper, default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf
    )
    return text.removesuffix("\n").removesuffix("\n...")


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that the file `path` holds.

    Raises:
        UserError: no such file, unreadable, not YAML, empty, or not a mapping.
    """
    with doing(f"reading {path}"):
        if not path.exists():
            raise UserError(f"{path}: no such file{_closest_path(path)}")
        check_regular(path)
        content = path.read_bytes()
    try:
        data = parse_yaml(content)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds no `key: value` lines such as dataset: and model:")
    return data


def _closest_path(path: Path) -> str:
    """The existing path that is closest to the first part of `path` that is missing."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    siblings = missing.parent.iterdir() if missing.parent.is_dir() else []
    # A link that leads nowhere would be its own correction.
    return did_you_mean(str(missing), [str(sibling) for sibling in siblings if sibling.exists()])
