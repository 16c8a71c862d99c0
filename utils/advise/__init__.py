"""Which small network to ship, what it gains by a teacher, and what it costs."""

from utils.advise.advice import advise

__all__ = ["advise"]
