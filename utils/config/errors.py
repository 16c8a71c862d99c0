"""From what pydantic found wrong to one line for the person who wrote the config."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from utils.config.wording import closest, short, show
from utils.errors import UserError

Key = tuple[str, ...]
Model = TypeVar("Model", bound=BaseModel)

_MUST_BE = {
    "bool_type": "true or false",
    "dict_type": "a mapping of keys",
    "finite_number": "a finite number",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a mapping of keys",
    "string_too_short": "a word",
    "string_type": "a word",
    "string_unicode": "a word in UTF-8",
    "tuple_type": "a list",
}


def validate(model: type[Model], data: dict[str, Any], source: Callable[[Key], str]) -> Model:
    """What `data` amounts to.

    Args:
        model: the pydantic model that knows the keys.
        source: says who set a key; the empty key stands for the whole.

    Raises:
        UserError: one line about the first thing that is wrong, and how many more there are.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        # A misspelt key is often the cause of the others, e.g. of a missing one.
        found = sorted(error.errors(include_url=False), key=lambda item: item["type"] != "extra_forbidden")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(_describe(found[0], source, model) + more) from None


def all_fields(section: type[BaseModel], prefix: Key = ()) -> Iterator[tuple[Key, FieldInfo]]:
    """Every key of `section` that holds a value, with its default and description, in order."""
    for name, field in section.model_fields.items():
        nested = _section_of(field)
        if nested:
            yield from all_fields(nested, (*prefix, name))
        else:
            yield (*prefix, name), field


def _describe(error: dict[str, Any], source: Callable[[Key], str], model: type[BaseModel]) -> str:
    key = tuple(part for part in error["loc"] if isinstance(part, str))
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).removeprefix(".")
    kind = error["type"]
    if kind == "extra_forbidden":
        return f"{source(key)}: unknown key {short(dotted)}{_suggestion(key, model)}"
    if kind == "missing":
        return f"{source(key)}: {dotted} is missing{_meaning(key, model)}"
    if kind == "invalid_key":  # 1: or true:, which YAML reads as a number and as a flag
        return f"{source(key)}: the key {dotted} is no word; quotation marks make it one"
    complaint = _complaint(error)
    found = f"found {show(error['input'])}, " if complaint.startswith("must") else ""
    return ": ".join(filter(None, (source(key), short(dotted), found + complaint)))


def _complaint(error: dict[str, Any]) -> str:
    kind, context = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _MUST_BE:
        limits = {name: f"{value:g}" if isinstance(value, float) else value for name, value in context.items()}
        return "must be " + _MUST_BE[kind].format(**limits)
    return error["msg"]


def _suggestion(key: Key, model: type[BaseModel]) -> str:
    """A known key that was probably meant: a sibling's spelling first, then the same word elsewhere."""
    known = _known_keys(model)
    sibling = closest(key[-1], [other[-1] for other in known if other[:-1] == key[:-1]])
    if sibling:
        return f" (did you mean {'.'.join((*key[:-1], sibling))}?)"
    elsewhere = [".".join(other) for other in known if other[-1] == key[-1]]
    return f" (did you mean {elsewhere[0]}?)" if elsewhere else ""


def _meaning(key: Key, model: type[BaseModel]) -> str:
    descriptions = {known: field.description for known, field in all_fields(model)}
    return f" ({descriptions[key]})" if descriptions.get(key) else ""


@cache
def _known_keys(model: type[BaseModel]) -> list[Key]:
    """Sections and keys alike."""
    keys = [key for key, _ in all_fields(model)]
    return list(dict.fromkeys(key[:length] for key in keys for length in range(1, len(key) + 1)))


def _section_of(field: FieldInfo) -> type[BaseModel] | None:
    for kind in (field.annotation, *get_args(field.annotation)):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None
