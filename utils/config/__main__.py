"""``python -m utils.config``: the table of all keys. With a file: what it amounts to, as YAML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from utils.command import Parser, guarded
from utils.config import Config, load_config
from utils.config.errors import all_fields
from utils.config.yaml_text import dump_yaml

BASE = ("base", "-", "file or files to start from, relative to this one; what stands here wins")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m utils.config", description=__doc__)
    parser.add_argument("file", nargs="?", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file")
    options = parser.parse_intermixed_args(arguments)
    if options.file is None:
        print(key_table())
    else:
        config = load_config(options.file, options.overrides)
        print(dump_yaml(config.to_dict()), end="")


def key_table() -> str:
    """Every key, its default and its meaning, one a line."""
    rows = [("KEY", "DEFAULT", "MEANING"), BASE]
    rows += [(".".join(key), _default(field), field.description + _choices(field)) for key, field in all_fields(Config)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {default:<{widths[1]}}  {meaning}" for key, default, meaning in rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else _flow(field.default)


def _choices(field: FieldInfo) -> str:
    """The values to choose from, where the key takes no others."""
    words = [word for kind in (field.annotation, *get_args(field.annotation)) for word in _literals(kind)]
    flags = ["true", "false"] if bool in get_args(field.annotation) else []
    return f" [{', '.join([*words, *flags])}]" if words else ""


def _literals(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is Literal else ()


def _flow(value: Any) -> str:
    """`value` as it would stand in a config."""
    value = list(value) if isinstance(value, tuple) else value
    return yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")


if __name__ == "__main__":
    guarded(main)
