"""The kinds of value a config key can have. Each complaint completes the sentence "found ..., must be ..."."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, Strict, StringConstraints

from utils.config.names import network_name, safe_name


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _split_epochs(value: Any) -> Any:
    """Read ``"150,180,210"`` and a lone ``150``, which are easier to type on a command line than a list."""
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    if isinstance(value, str):
        words = [word.strip() for word in value.split(",")]
        if not all(word.isdecimal() for word in words):
            raise ValueError("must be a list of epochs, e.g. [150, 180, 210]")
        return [int(word) for word in words]
    return value


def _increasing(epochs: tuple[int, ...]) -> tuple[int, ...]:
    if any(after <= before for before, after in pairwise(epochs)):
        raise ValueError("must increase from epoch to epoch")
    return epochs


def _of_length(length: int) -> BeforeValidator:
    """Tell of a list that is too short as a whole, instead of the items that it lacks."""

    def check(value: Any) -> Any:
        if isinstance(value, list | tuple) and len(value) != length:
            raise ValueError(f"must be a list of {length}")
        return value

    return BeforeValidator(check)


def _auto_or_flag(value: Any) -> Any:
    if value != "auto" and not isinstance(value, bool):
        raise ValueError("must be auto, true or false")
    return value


def _flag_or_share(value: Any) -> Any:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError("must be true, false or a share from 0 to 1")
    return value


def _without_nul(text: str) -> str:
    if "\0" in text:  # most texts become paths sooner or later
        raise ValueError("must hold no NUL")
    return text


def _within_float32(value: float) -> float:
    """PyTorch refuses to compute with more than a float32 can hold."""
    if abs(value) > 1e38:
        raise ValueError("must be between -1e38 and 1e38")
    return value


def _balanced_or_list(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) else []
    fit = all(isinstance(number, int | float) and 0 < number < 1e38 for number in numbers)
    if value != "balanced" and not (numbers and fit):
        raise ValueError("must be balanced or a list with a number above 0 for each class")
    return value


def _low_and_high(values: tuple[float, float]) -> tuple[float, float]:
    if values[0] >= values[1]:
        raise ValueError("must be a lower and a higher number")
    return values


def _known_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,2})?", name):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return name


Number = Annotated[float, BeforeValidator(_no_bool), Field(allow_inf_nan=False), AfterValidator(_within_float32)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Integer = Annotated[int, Strict()]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
Index = Annotated[Integer, Field(ge=0, lt=2**31)]
Workers = Annotated[Integer, Field(ge=0, le=1024)]
Flag = Annotated[bool, Strict()]
AutoFlag = Annotated[bool | Literal["auto"], BeforeValidator(_auto_or_flag)]
FlagOrShare = Annotated[bool | float, BeforeValidator(_flag_or_share)]
Text = Annotated[str, StringConstraints(strict=True, min_length=1), AfterValidator(_without_nul)]
Place = Annotated[Text, AfterValidator(os.path.expanduser)]  # shells leave the ~ of run.root=~/runs alone
Name = Annotated[Text, AfterValidator(safe_name)]
NetworkName = Annotated[Text, AfterValidator(network_name)]
Device = Annotated[Text, AfterValidator(_known_device)]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(_split_epochs), AfterValidator(_increasing)]
Triple = Annotated[tuple[Number, Number, Number], _of_length(3)]
PositiveTriple = Annotated[tuple[Positive, Positive, Positive], _of_length(3)]
ClassWeights = Annotated[Literal["balanced"] | tuple[float, ...], BeforeValidator(_balanced_or_list)]
ValueRange = Annotated[tuple[Number, Number], _of_length(2), AfterValidator(_low_and_high)]
Pair = Annotated[tuple[Integer, Integer], _of_length(2)]

T = TypeVar("T")
INCIDENTAL = "incidental"
Incidental = Annotated[T, INCIDENTAL]  # says where or how fast a run goes, or what it writes; decides no result
