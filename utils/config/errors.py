"""From what pydantic found wrong to one line for the person who wrote the config."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from utils.errors import UserError, did_you_mean

Key = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)


def validate(
    model: type[Model], data: dict[str, Any], source: Callable[[Key], str], context: str | None = None
) -> Model:
    """What `data` amounts to.

    Args:
        model: the pydantic model that knows the keys.
        source: says who set a key; the empty key stands for the whole.
        context: for validators.

    Raises:
        UserError: one line about the first thing that is wrong, and how many more there are.
    """
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        # A misspelt key is often the cause of the others, e.g. of a missing one.
        found = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(_describe(found[0], source, model) + more) from None


def all_fields(section: type[BaseModel], prefix: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Every key of `section` that holds a value, with its default and description, in order."""
    for name, field in section.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        nested = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if nested:
            yield from all_fields(nested, (*prefix, name))
        else:
            yield (*prefix, name), field


def _describe(error: dict[str, Any], source: Callable[[Key], str], model: type[BaseModel]) -> str:
    key = tuple(part for part in error["loc"] if isinstance(part, str))
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    if error["type"] == "extra_forbidden":
        return f"{source(key)}: unknown key {dotted[:60]}{_suggestion(key, model)}"
    given, message = error["input"], error["msg"].removeprefix("Value error, ")
    if error["type"] == "missing" or isinstance(given, dict | BaseModel) or message.startswith("unknown"):
        found = ""  # the message says it, or it is long
    else:
        found = f"found {reprlib.repr(given)}"
    return ": ".join(filter(None, (source(key), dotted, found, message)))


def _suggestion(key: Key, model: type[BaseModel]) -> str:
    """The key that was probably meant: one that ends in the same word, else the closest of all."""
    keys = [key for key, _ in all_fields(model)]
    known = dict.fromkeys(".".join(key[:length]) for key in keys for length in range(1, len(key) + 1))
    same_word = [other for other in known if other.endswith(f".{key[-1]}")]
    return did_you_mean(".".join(key), same_word or known, cutoff=0 if same_word else 0.6)
