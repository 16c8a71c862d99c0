"""Networks cut into stages, and the adapters between their features."""

import inspect
from collections.abc import Callable

from torch import nn

from models.registry import MODELS, register_model
from models.staged import StagedModel
from models.wrapping.build import locate, wrap_model, wrap_module
from models.wrapping.factory import call_factory
from utils.errors import UserError

__all__ = ["MODELS", "StagedModel", "find_builder", "get_model", "register_model", "wrap_model", "wrap_module"]


def find_builder(name: str) -> Callable[..., nn.Module]:
    """What builds the model called `name`, see `get_model`.

    Raises:
        utils.errors.UserError: there is no such model.
    """
    if "." not in name:
        return MODELS.get(name)
    try:
        return locate(name)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error


def get_model(
    name: str,
    num_classes: int,
    *,
    stages: list[list[str]] | None = None,
    kwargs: dict | None = None,
    image_size: tuple[int, int] = (32, 32),
) -> StagedModel:
    """Build the model called `name`.

    Args:
        name: a registered name (``list(models.MODELS)``), or the import path of a callable that returns any
            module, e.g. ``torchvision.models.resnet34``; see `models.wrapping.build.wrap_model`.
        num_classes: width of the logits.
        stages: how to cut a module of the second kind, where that is not evident; registered models are cut already.
        kwargs: further keyword arguments of the model.
        image_size: height and width of the images, on which such a cut is checked; registered models take any.

    Raises:
        utils.errors.UserError: there is no such model, or it cannot be built or cut as asked.
    """
    kwargs = kwargs or {}
    if "." in name:
        return wrap_model(name, num_classes, stages, kwargs, image_size)
    build = MODELS.get(name)
    if stages is not None:
        raise UserError(f"model {name!r} is cut into stages already; `stages` is for models given by an import path")
    arguments = inspect.signature(build)
    try:
        arguments.bind(num_classes=num_classes, **kwargs)
    except TypeError as error:
        raise UserError(f"model {name!r}: {error}; its arguments are {', '.join(arguments.parameters)}") from error
    try:
        return call_factory(build, num_classes, kwargs)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error
