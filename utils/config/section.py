"""What all groups of keys in a config have in common."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator


class Section(BaseModel):
    """A group of keys. Refuses keys it does not know; cannot be changed once it is validated."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _empty_heading(cls, value: Any) -> Any:
        """A heading with nothing under it means the defaults."""
        return {} if value is None else value
