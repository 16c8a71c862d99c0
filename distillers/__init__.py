"""The distillers (what to distil), and the method that chooses the spots (`spot_adaptive`)."""

from distillers.registry import DISTILLERS, register_distiller

__all__ = ["DISTILLERS", "register_distiller"]
