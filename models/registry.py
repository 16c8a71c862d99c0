"""The names under which models are known."""

from utils.registry import Registry

MODELS: Registry = Registry("model", "models")
register_model = MODELS.register
