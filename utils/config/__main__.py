"""``python -m utils.config``: the table of all keys. With a file: all settings of its experiment, as YAML; of a base
file, which is no experiment yet, those that it and its own bases give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from utils.command import Parser, guarded
from utils.config import Config
from utils.config.errors import all_fields
from utils.config.layers import Layers
from utils.config.yaml_text import dump_yaml, spell

BASE = ("base", "-", "file or files to start from, relative to this one; what stands here wins")
EXAMPLE_SINGLE = {"dataset": {"name": "digits"}, "model": {"name": "vgg8"}}
EXAMPLE_PAIR = {
    "dataset": {"name": "digits"},
    "kd": {"teacher": {"name": "vgg13"}, "student": {"name": "vgg8"}},
    "kd_loss": {"name": "at"},
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m utils.config", description=__doc__)
    parser.add_argument("file", nargs="?", help="a config file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="keys that win over the file")
    options = parser.parse_intermixed_args(arguments)
    if options.file is None:
        print(key_table())
    else:
        print(dump_yaml(settings(options.file, options.overrides)), end="")


def settings(file: str, overrides: Sequence[str]) -> dict[str, Any]:
    """The settings of a file; a base file is completed by names, checked, and shown without them."""
    layers = Layers(file)
    layers.add_file(file)
    layers.add_overrides(overrides)
    data = layers.data
    kd = data.get("kd")
    if "model" in data or (isinstance(kd, dict) and {"teacher", "student"} <= kd.keys()):
        return layers.config().to_dict()
    experiment = EXAMPLE_PAIR if {"kd", "kd_loss"} & data.keys() else EXAMPLE_SINGLE
    complete = Layers(file, [("", experiment), *layers.parts])
    complete.config()
    print("# a base file: what experiments that start from it share")
    return data


def key_table() -> str:
    """Every key, its default and its meaning, one a line."""
    rows = [("KEY", "DEFAULT", "MEANING"), BASE]
    rows += [(".".join(key), _default(field), field.description + _choices(field)) for key, field in all_fields(Config)]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{key:<{widths[0]}}  {default:<{widths[1]}}  {meaning}" for key, default, meaning in rows)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "-" if field.default is None else spell(field.default)


def _choices(field: FieldInfo) -> str:
    """The values to choose from, where the key takes no others."""
    kinds = (field.annotation, *get_args(field.annotation))
    words = [spell(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
    return f" [{', '.join(words)}]" if words else ""


if __name__ == "__main__":
    guarded(main)
