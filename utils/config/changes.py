"""What is different between two configs, and which of it decides a result."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from utils.config.errors import all_fields
from utils.config.schema import Config
from utils.config.types import INCIDENTAL


def flatten(config: dict[str, Any]) -> dict[str, Any]:
    """Nested settings as one dict of dotted keys."""
    return dict(_walk(config, ""))


def differences(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, each with both. A key that one side does not know says nothing."""
    old, new = flatten(before), flatten(after)
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def deciding_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` as dotted keys, without those that the schema marks as `Incidental`."""
    return {key: value for key, value in flatten(config).items() if key not in _incidental_keys()}


@cache
def _incidental_keys() -> frozenset[str]:
    return frozenset(".".join(key) for key, field in all_fields(Config) if INCIDENTAL in field.metadata)


def _walk(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in section.items():
        if isinstance(value, dict) and value:
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
