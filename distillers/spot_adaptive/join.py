"""From two networks and names to the task that distils one from the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from distillers import DISTILLERS
from distillers.base import Distiller, Setting, options_of, refuse_unknown_options
from distillers.logits import LOGIT_LOSSES, LogitLoss
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.spot_adaptive.selection import find_selection
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
    selection: str = "adaptive",
    policy: str = "gumbel",
    policy_options: Mapping[str, Any] | None = None,
    homogeneous: bool = False,
    gate_temperature: float = 5.0,
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
        selection: where to distil, a name of `SELECTIONS`.
        policy: name of the policy of those selections that have one, with its options. `homogeneous` (teacher and
            student are of one family) and `gate_temperature` are explained in `PolicySetting`.
        pair: ``"teacher-student"``, for messages.
        settings: the others of `SpotAdaptiveDistillation`, e.g. ``gamma=2.0``.

    Raises:
        UserError: there is no such distiller, loss or policy, or it does not fit the networks.
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
    chooser = None
    if find_selection(selection).policy:
        # Imported here, so that the plain distiller loads nothing of the routing.
        from distillers.spot_adaptive.policy import PolicySetting, make_policy

        chooser = make_policy(
            policy, PolicySetting(*shapes.values(), made.spots, homogeneous, gate_temperature), policy_options or {}
        )
    return SpotAdaptiveDistillation(
        *networks.values(),
        made,
        *shapes.values(),
        selection=selection,
        policy=chooser,
        beta=made.default_weight if beta is None else beta,
        logit_loss=make_logit_loss(logits or made.logit_loss, temperature, logits_options or {}),
        **settings,
    )


def make_distiller(name: str, setting: Setting, options: Mapping[str, Any]) -> Distiller:
    """The distiller called `name`, built with `options`; an option that it does not have is a UserError."""
    kind = DISTILLERS.get(name)
    refuse_unknown_options("kd_loss.options", name, options_of(kind), options)
    return kind(setting, **options)


def make_logit_loss(name: str, temperature: float, options: Mapping[str, Any]) -> LogitLoss:
    """The loss at the logits that is called `name`; see `make_distiller`."""
    kind = LOGIT_LOSSES.get(name)
    refuse_unknown_options("kd_loss.logits_options", name, kind.options(), options)
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
