"""How values and names look in messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from utils.errors import UserError


@contextmanager
def one_line() -> Iterator[None]:
    """Keep the errors raised inside to one line, whatever keys, values and file names they quote."""
    try:
        yield
    except UserError as error:
        raise UserError(printable(str(error))) from None


def printable(text: str) -> str:
    """`text` with line breaks and control characters spelt out, e.g. as ``\\n``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


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
