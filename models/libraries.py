"""Networks of timm by name, and the weights that timm and torchvision offer for theirs."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.errors import UserError, doing
from utils.libraries import TIMM, is_timm, weights_key, without_weights


def timm_builder(name: str) -> Callable[..., nn.Module]:
    """What builds the network ``timm/<name>``, with random weights.

    Raises:
        UserError: timm is not installed, or has no such network.
    """
    timm, model = _timm(name), name.removeprefix(TIMM)
    if not timm.is_model(model):
        close = timm.list_models(f"{model.partition('.')[0][:6]}*")[:5]
        raise UserError(f"timm has no network {model!r}{'; it has ' + ', '.join(close) if close else ''}")
    return partial(timm.create_model, model)


def offered_weights(
    name: str, kwargs: Mapping[str, Any], num_classes: int, *, new_head: bool
) -> dict[str, Tensor] | None:
    """The weights that `kwargs` ask for; None if they ask for none.

    That is ``{pretrained: true}`` or ``{pretrained: FILE}`` of timm, ``{weights: DEFAULT}`` or another name of
    torchvision's. They come from the local cache, or are downloaded into it.

    Args:
        new_head: the classifier need not be of `num_classes`.

    Raises:
        UserError: they are not there, or their classifier is of other classes.
    """
    wanted = kwargs.get(weights_key(name) or "")
    if wanted in (None, False):
        return None
    others = without_weights(name, kwargs)
    if is_timm(name):
        return _of_timm(name, wanted, others, num_classes, new_head)
    return _of_torchvision(name, wanted)


def _of_timm(name: str, wanted: Any, kwargs: dict[str, Any], num_classes: int, new_head: bool) -> dict[str, Tensor]:
    timm, build = _timm(name), timm_builder(name)
    if wanted is True:
        known = timm.get_pretrained_cfg(name.removeprefix(TIMM))
        if known is not None and known.num_classes != num_classes and not new_head:
            raise UserError(
                f"kwargs: the pretrained weights know {known.num_classes} classes, here {num_classes}; "
                "new_head=true trains a new classifier"
            )
    elif not isinstance(wanted, str) or not Path(wanted).is_file():
        raise UserError(f"kwargs: pretrained is {wanted!r}, must be true or a file")
    else:
        # timm replaces a classifier that by its own records has other classes than are wanted.
        classes = {} if new_head else {"num_classes": num_classes}
        kwargs = {**kwargs, "pretrained_cfg_overlay": {"file": wanted} | classes}
    with doing(
        "kwargs: reading the pretrained weights (pretrained=FILE takes a file, pretrained=false random weights)"
    ):
        return build(num_classes=num_classes, pretrained=True, **kwargs).state_dict()


def _of_torchvision(name: str, wanted: Any) -> dict[str, Tensor]:
    with doing("kwargs: looking for the weights that torchvision offers for it"):
        offered = _offered_by_torchvision(name)
    names = [*offered.__members__]
    word = str(wanted).removeprefix(f"{offered.__name__}.")
    if word not in names:
        raise UserError(f"kwargs: weights is {wanted!r}, must be {' or '.join(names)}")
    with doing(f"kwargs: reading the weights {word} or fetching them (checkpoint=FILE takes a file)"):
        return offered[word].get_state_dict(progress=False, check_hash=True)


def expected_images(name: str, kwargs: Mapping[str, Any]) -> dict[str, list]:
    """How images were prepared for the weights that `kwargs` ask for: ``mean``, ``std``, ``image_size``; may be empty.

    Args:
        kwargs: of which `offered_weights` has found the weights.
    """
    if is_timm(name):
        known = _timm(name).get_pretrained_cfg(name.removeprefix(TIMM))
        return {"mean": [*known.mean], "std": [*known.std], "image_size": [*known.input_size[1:]]} if known else {}
    offered = _offered_by_torchvision(name)
    images = offered[str(kwargs["weights"]).removeprefix(f"{offered.__name__}.")].transforms()
    return {"mean": [*images.mean], "std": [*images.std], "image_size": 2 * [*images.crop_size]}


def _offered_by_torchvision(name: str) -> Any:
    from torchvision import models

    package, _, builder = name.rpartition(".")
    return models.get_model_weights(getattr(importlib.import_module(package), builder))


def _timm(name: str) -> Any:
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UserError("needs timm; pip install timm") from error
