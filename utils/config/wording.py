"""How values and names look in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


def short(text: str, limit: int = 60) -> str:
    """`text`, cut with an ellipsis if it is longer than `limit`."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def show(value: Any) -> str:
    """What a message says was found."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    return "a mapping" if isinstance(value, dict) else short(repr(value))


def closest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` was probably meant to be."""
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)
