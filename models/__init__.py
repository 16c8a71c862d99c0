"""Networks cut into stages, and the adapters between their features."""

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

from models.cut.build import wrap_module
from models.cut.given import Stages
from models.cut.view import original
from models.libraries import timm_builder
from models.registry import MODELS, register_model
from models.staged import StagedModel
from utils.errors import UserError, did_you_mean, doing
from utils.libraries import is_timm, without_weights

__all__ = [
    "MODELS",
    "StagedModel",
    "find_builder",
    "get_model",
    "is_short_name",
    "original",
    "register_model",
    "wrap_module",
]


def is_short_name(name: str) -> bool:
    """Whether `name` can only be that of a model in ``models/``."""
    return "." not in name and not is_timm(name)


def find_builder(name: str) -> Callable[..., nn.Module]:
    """What builds the model called `name`, see `get_model`.

    Raises:
        utils.errors.UserError: there is no such model.
    """
    if is_short_name(name):
        if (known := MODELS.canonical(name)) != name:  # folders and config files are called by that
            raise UserError(f"model {name!r}: its name is {known}")
        return MODELS.get(name)
    try:
        return timm_builder(name) if is_timm(name) else _locate(name)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error


def get_model(
    name: str,
    num_classes: int,
    *,
    stages: Stages | None = None,
    kwargs: dict | None = None,
    image_size: tuple[int, int] = (32, 32),
) -> StagedModel:
    """Build the model called `name`.

    Args:
        name: a registered name (``list(models.MODELS)``), ``timm/<name>``, or the import path of a callable that
            returns any module, e.g. ``torchvision.models.resnet34`` or ``mypackage.nets.MyNet``.
        num_classes: width of the logits.
        stages: how to cut a module that is not registered, see `models.cut.given.given_pieces`; None: it is cut
            by itself.
        kwargs: further keyword arguments of the model. One that asks for weights is left out, see
            `models.libraries.offered_weights`.
        image_size: height and width of the images, on which such a cut is tried out; registered models take any.

    Raises:
        utils.errors.UserError: there is no such model, or it cannot be built or cut as asked.
    """
    build = find_builder(name)
    try:
        kwargs = without_weights(name, kwargs or {})
        with doing(f"calling it with {', '.join(['num_classes', *kwargs])}"):
            module = build(num_classes=num_classes, **kwargs)
        if not isinstance(module, nn.Module):
            raise UserError(f"calling it gives a {type(module).__name__}, not a torch.nn.Module")
        if isinstance(module, nn.DataParallel):  # training shares batches by itself, and no export takes it
            module = module.module
        return wrap_module(module, num_classes, image_size, stages)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error


def _locate(path: str) -> Callable[..., nn.Module]:
    """The callable at an import path. The current directory is searched as well.

    Raises:
        utils.errors.UserError: there is none.
    """
    if not {"", os.getcwd()}.intersection(sys.path):
        sys.path.append(os.getcwd())
    module_name, _, attribute = path.rpartition(".")
    with doing(f"importing {module_name!r}, installed or in this directory,"):
        module = importlib.import_module(module_name)
    if not callable(getattr(module, attribute, None)):
        known = [name for name, value in vars(module).items() if callable(value)]
        raise UserError(f"{module_name!r} has no class or function {attribute!r}{did_you_mean(attribute, known)}")
    return getattr(module, attribute)
