"""Networks of your own: whatever has an import path becomes a `StagedModel`, from the config alone."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

from models.staged import StagedModel
from models.wrapping.cuts import find_cuts, spelt
from models.wrapping.factory import call_factory
from models.wrapping.layout import find_layout
from models.wrapping.libraries import timm_builder
from models.wrapping.probe import Probe
from models.wrapping.wrapped import BEFORE, WHOLE, Cuts, WrappedModel, expand_slices, explain, listed, prefix_tokens
from utils.errors import UserError
from utils.libraries import is_timm, without_weights


def wrap_model(
    name: str, num_classes: int, stages: Cuts | None, kwargs: dict, image_size: tuple[int, int]
) -> StagedModel:
    """Build the module at the import path `name` and cut it into stages.

    The result holds the very parts of that module: the keys of its `state_dict` are the original's, so weights go
    in and come out unchanged. Every part with an `inplace` switch gets it turned off, for a stage must not
    overwrite the feature that it is handed. Before anything is returned, random images prove on a copy that the
    stages do what the module's own forward does, in evaluation and in training mode.

    Args:
        name: ``timm/<name>``, or the dotted path of a callable that returns the module, e.g.
            ``torchvision.models.resnet34`` or ``mypackage.nets.MyNet``; the current directory is searched as well.
        num_classes: given to the callable under this name.
        stages: for every stage its steps. A step is a part of the module (``layer1``, ``features.3``), a slice of a
            Sequential (``features.0:4``) or an operation: ``relu``, ``flatten``, ``pool`` (average over all
            positions); of a part and an operation of one name the part is meant. The last stage is the classifier,
            and the last feature is a vector. None: `models.wrapping.cuts.find_cuts` finds them; a `StagedModel` is
            cut already.
        kwargs: further keyword arguments of the callable. One that asks for weights is left out, see
            `models.wrapping.libraries.offered_weights`.
        image_size: height and width of the images.

    Raises:
        UserError: in one line, what is wrong with the path, the callable or the stages, and what would do.
    """
    try:
        module = call_factory(
            timm_builder(name) if is_timm(name) else locate(name), num_classes, without_weights(name, kwargs)
        )
        return wrap_module(module, num_classes, image_size, stages)
    except UserError as error:
        raise UserError(f"model {name!r}: {error}") from error


def locate(path: str) -> Callable[..., nn.Module]:
    """The callable at an import path.

    Raises:
        UserError: there is none.
    """
    if not {"", os.getcwd()}.intersection(sys.path):
        sys.path.append(os.getcwd())
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # somebody's file may raise anything, and be a program
        raise UserError(f"cannot import {module_name!r}, installed or in this directory: {explain(error)}") from error
    if not callable(getattr(module, attribute, None)):
        known = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(attribute, known)
        raise UserError(f"{module_name!r} has no class or function {attribute!r}; it has {listed(close or known)}")
    return getattr(module, attribute)


def wrap_module(
    module: nn.Module, num_classes: int | None, image_size: tuple[int, int], stages: Cuts | None = None
) -> StagedModel:
    """Cut a module into stages.

    Args:
        module: it and the result have their parts in common. A `StagedModel` is returned as it is.
        num_classes: how many logits it has to give; None: as many as it does.
        image_size, stages: see `wrap_model`, also for the errors.
    """
    if isinstance(module, StagedModel):
        if stages is not None:
            raise UserError("is cut into stages by its own class; leave `stages` out")
        return module
    for part in module.modules():
        if hasattr(part, "inplace"):
            part.inplace = False
    probe = Probe(module, num_classes, image_size)
    if stages is None:
        cuts, uncut = find_cuts(probe)
    else:
        cuts, uncut = expand_slices(module, stages), ""
        try:
            probe.check(cuts)
        except UserError as error:
            raise UserError(f"stages: {error}{_suggestion(probe)}") from error
    layouts = []
    for number, shape in enumerate(probe.shapes(cuts)):
        try:
            layouts.append(find_layout(shape, image_size, prefix_tokens(module)))
        except ValueError as error:
            raise UserError(f"stages: feature {number} is {error}; let its stage end elsewhere") from error
    return WrappedModel(module, cuts, layouts, uncut)


def _suggestion(probe: Probe) -> str:
    """Stages that are right, where there are more than two."""
    cuts, _ = find_cuts(probe)
    return "" if cuts[0][0].startswith((BEFORE, *WHOLE[0])) else f"; stages that do: {spelt(cuts)}"
