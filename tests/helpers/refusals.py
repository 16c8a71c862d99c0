"""What is said of something that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from utils.errors import UserError


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    """The line of the `UserError` that the call must end in."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    return str(error.value)
