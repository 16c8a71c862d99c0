"""The registries of what a file in this folder can add (distillers, losses at the logits, policies), and `build`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from utils.errors import UserError
from utils.registry import Registry

DISTILLERS: Registry = Registry("distiller", "distillers")
LOGIT_LOSSES: Registry = Registry("loss at the logits", "distillers")
POLICIES: Registry = Registry("policy", "distillers", "distillers.spot_adaptive.policy")
register_distiller = DISTILLERS.register
register_logit_loss = LOGIT_LOSSES.register
register_policy = POLICIES.register


def build(kinds: Registry, name: str, key: str, options: Mapping[str, Any] | None, argument: Any) -> Any:
    """What is registered as `name`, built from `argument` and the `options` that the config gives under `key`.

    Raises:
        UserError: see `check_options`.
    """
    return kinds.get(name)(argument, **check_options(kinds, name, key, options))


def check_options(kinds: Registry, name: str, key: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `options` of what is registered as `name`, which the config gives under `key`, converted to their types.

    Options are the keyword arguments of its constructor or, of a loss at the logits, of its function. They are checked
    by the types that these say, such as ``pydantic.PositiveFloat``.

    Raises:
        UserError: it is not registered, has no such option, or the value is impossible.
    """
    kind = kinds.get(name)
    function = getattr(kind, "function", None)
    # No options are: self and `argument` of a constructor; student, teacher and gate of a function, and what a loss at
    # the logits passes to it by name.
    given, by_name = (3, ("label", "temperature")) if function else (2, ())
    function = inspect.unwrap(function or kind.__init__)
    arguments = list(inspect.signature(function).parameters.values())[given:]
    types: dict[str, Any] = {}
    for each in arguments:
        if each.annotation is not each.empty:
            with suppress(NameError, AttributeError):  # of a type that is imported for type checkers alone
                annotated = SimpleNamespace(__annotations__={each.name: each.annotation})
                types |= get_type_hints(annotated, getattr(function, "__globals__", {}), include_extras=True)
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    known = [each.name for each in arguments if each.kind not in several and each.name not in by_name]
    checked = {}
    for option, value in (options or {}).items():
        if option not in known:
            raise UserError(f"{key}: {name} has no option {option!r}; it has {', '.join(known) or 'none'}")
        try:
            checked[option] = TypeAdapter(types.get(option, Any)).validate_python(value)
        except ValidationError as error:
            raise UserError(f"{key}: {name}.{option} is {value!r}: {error.errors()[0]['msg']}") from error
    needed = [each.name for each in arguments if each.default is each.empty and each.name in known]
    if missing := [option for option in needed if option not in checked]:
        raise UserError(f"{key}: {name} needs {', '.join(missing)}")
    return checked
