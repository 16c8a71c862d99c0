"""Networks cut into stages, and the adapters between their features."""

from models.registry import MODELS, register_model
from models.staged import StagedModel

__all__ = ["MODELS", "StagedModel", "get_model", "register_model"]


def get_model(name: str, num_classes: int, **kwargs) -> StagedModel:
    """Build the model called `name`.

    Args:
        name: a registered name (``list(models.MODELS)``).
        num_classes: width of the logits.
        **kwargs: passed on to the model.

    Raises:
        utils.errors.UserError: there is no such model.
    """
    return MODELS.get(name)(num_classes=num_classes, **kwargs)
