"""The distillers (what to distil) and the spot-adaptive wrapper (where)."""

from distillers.registry import DISTILLERS, register_distiller

__all__ = ["DISTILLERS", "register_distiller"]
