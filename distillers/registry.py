"""The names under which distillers are known."""

from utils.registry import Registry

DISTILLERS: Registry = Registry("distiller", "distillers")
register_distiller = DISTILLERS.register
