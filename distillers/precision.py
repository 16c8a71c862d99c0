"""The name under which users' own distillers import `distillers.ops.precision`."""

from distillers.ops.precision import at_least

__all__ = ["at_least"]
