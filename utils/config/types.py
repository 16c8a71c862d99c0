"""The kinds of value that a config key can have, and what all groups of keys have in common."""

from __future__ import annotations

import os
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StringConstraints,
    model_validator,
)

from utils.config.names import network_name, safe_name
from utils.registry import fold


class Section(BaseModel):
    """A group of keys. Refuses keys it does not know; cannot be changed once it is validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_heading(cls, value: Any) -> Any:
        """A heading with nothing under it means the defaults."""
        return {} if value is None else value


def spelt_like(choices: Iterable[str]) -> BeforeValidator:
    """Lets a name differ from one of `choices` in case and dashes, ``"adamw"`` → ``"AdamW"``."""
    known = {fold(choice): choice for choice in choices}
    return BeforeValidator(lambda name: known.get(fold(str(name)), name))


def _as_list(value: Any) -> Any:
    """Read ``"150,180,210"`` and a lone ``150``, which are easier to type on a command line than a list."""
    if isinstance(value, str):
        return [int(word) if word.strip().isdecimal() else word for word in value.split(",")]
    return [value] if isinstance(value, int) else value


def _increasing(numbers: tuple[float, ...]) -> tuple[float, ...]:
    if any(after <= before for before, after in pairwise(numbers)):
        raise ValueError("each must be larger than the one before")
    return numbers


def _balanced_or_list(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) else []
    fit = all(isinstance(number, int | float) and 0 < number < 1e38 for number in numbers)
    if value != "balanced" and not (numbers and fit):
        raise ValueError("must be balanced or a list with a number above 0 for each class")
    return value


# The limits are those of float32, with which PyTorch computes.
Number = Annotated[float, Strict(), Field(allow_inf_nan=False, ge=-1e38, le=1e38)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Integer = Annotated[int, Strict()]
Count = Annotated[Integer, Field(ge=1, lt=2**31)]
Index = Annotated[Integer, Field(ge=0, lt=2**31)]
Workers = Annotated[Integer, Field(ge=0, le=1024)]
Flag = Annotated[bool, Strict()]
AutoFlag = Literal["auto", True, False]
Text = Annotated[str, StringConstraints(strict=True, min_length=1, pattern=r"^[^\x00]*$")]  # most texts become paths
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]  # shells leave the ~ of run.root=~/runs alone
Name = Annotated[Text, AfterValidator(safe_name)]
NetworkName = Annotated[Text, AfterValidator(network_name)]
Device = Annotated[Text, Field(pattern=r"^(auto|cpu|cuda(:[0-9]{1,2})?)$")]
Epochs = Annotated[tuple[Count, ...], BeforeValidator(_as_list), AfterValidator(_increasing)]
Means = Annotated[tuple[Annotated[NotNegative, Field(le=1)], ...], Field(min_length=3, max_length=3)]
Deviations = Annotated[tuple[Annotated[Positive, Field(le=1)], ...], Field(min_length=3, max_length=3)]
ClassWeights = Annotated[Literal["balanced"] | tuple[float, ...], BeforeValidator(_balanced_or_list)]
ValueRange = Annotated[tuple[Number, ...], Field(min_length=2, max_length=2), AfterValidator(_increasing)]
Pair = Annotated[tuple[Integer, ...], Field(min_length=2, max_length=2)]

T = TypeVar("T")
INCIDENTAL = "incidental"
Incidental = Annotated[T, INCIDENTAL]  # says where or how fast a run goes, or what it writes; decides no result
