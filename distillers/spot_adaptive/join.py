"""From two networks and names to the task that distils one from the other."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distillers import DISTILLERS
from distillers.base import Distiller, Setting
from distillers.logits import LOGIT_LOSSES, LogitLoss
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from models import StagedModel, wrap_module
from utils.errors import UserError


def join(
    student: nn.Module,
    teacher: nn.Module,
    distiller: str,
    *,
    labels: Tensor,
    image_size: tuple[int, int],
    options: Mapping[str, Any] | None = None,
    spots: Sequence[tuple[int, int]] | None = None,
    feat_dim: int = 128,
    logits: str | None = None,
    logits_options: Mapping[str, Any] | None = None,
    temperature: float = 4.0,
    beta: float | None = None,
    pair: str = "teacher-student",
    **settings: Any,
) -> SpotAdaptiveDistillation:
    """The task that distils `student` from `teacher`.

    Args:
        student, teacher: any modules; those that are no `StagedModel` are cut into stages, see `models.wrap_module`,
            and keep their parameters.
        distiller: its name, e.g. ``"at"``; `options` are those of its constructor, of which `spots` and `feat_dim` are
            explained in `Setting`.
        labels: class of every training sample, int64 ``[N]``, in index order.
        image_size: height and width of the images.
        logits: name of the loss at the logits, with its options and its temperature; None for the distiller's own.
        beta: weight of the distiller's losses; None for the published one.
        pair: ``"teacher-student"``, for messages.
        settings: the others of `SpotAdaptiveDistillation`, e.g. ``selection="fixed"``.

    Raises:
        UserError: there is no such distiller, or it does not fit the networks.
    """
    networks = {"student": wrap_module(student, None, image_size), "teacher": wrap_module(teacher, None, image_size)}
    shapes = {role: network.feature_shapes(*image_size) for role, network in networks.items()}
    setting = Setting(**shapes, labels=labels, spots=spots, feat_dim=feat_dim, pair=pair)
    try:
        made = make_distiller(distiller, setting, options or {})
        if not made.logits_only:
            _refuse_one_piece(networks, distiller)
    except UserError as error:
        reasons = [_why_uncut(role, network) for role, network in networks.items() if network.uncut]
        raise UserError("; ".join([str(error), *reasons[:1]])) from error  # two would be long
    return SpotAdaptiveDistillation(
        *networks.values(),
        made,
        *shapes.values(),
        beta=made.default_weight if beta is None else beta,
        logit_loss=make_logit_loss(logits or made.logit_loss, temperature, logits_options or {}),
        **settings,
    )


def make_distiller(name: str, setting: Setting, options: Mapping[str, Any]) -> Distiller:
    """The distiller called `name`, built with `options`; an option that it does not have is a UserError."""
    kind = DISTILLERS.get(name)
    known = [argument for argument in inspect.signature(kind).parameters if argument != "setting"]
    _refuse_unknown_options("kd_loss.options", name, known, options)
    return kind(setting, **options)


def make_logit_loss(name: str, temperature: float, options: Mapping[str, Any]) -> LogitLoss:
    """The loss at the logits that is called `name`; see `make_distiller`."""
    kind = LOGIT_LOSSES.get(name)
    _refuse_unknown_options("kd_loss.logits_options", name, kind.options(), options)
    return kind(temperature, **options)


def _refuse_one_piece(networks: Mapping[str, StagedModel], distiller: str) -> None:
    for role, network in networks.items():
        if network.one_piece:
            raise UserError(f"{distiller}: the {role} is one piece without features; distiller=kd distils the logits")


def _why_uncut(role: str, network: StagedModel) -> str:
    return (
        f"kd.{role}.stages names stages (docs/extending.md), where the {role} is not cut further automatically: "
        f"{network.uncut}"
    )


def _refuse_unknown_options(key: str, name: str, known: Sequence[str], options: Mapping[str, Any]) -> None:
    """Check that the `options`, which the config gives under `key`, are among those that `name` has.

    Raises:
        UserError: one is not; the line names those that it has.
    """
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise UserError(f"{key}: {name} has no option {option!r}; {has}")
