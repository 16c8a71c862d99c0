"""From two networks and names to the task that distils one from the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distillers.base import Setting
from distillers.registry import DISTILLERS, LOGIT_LOSSES, POLICIES, build
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.spot_adaptive.policy import PolicySetting
from distillers.spot_adaptive.selection import SELECTIONS
from models import wrap_module
from models.staged import copied
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
        student, teacher: any modules that turn float32 images ``[B, 3, H, W]`` into logits of the same classes; those
            that are no `StagedModel` are cut into stages, see `models.wrap_module`, and keep their parameters. The
            teacher is frozen. One that shares parameters with the student is copied before.
        distiller: its name, e.g. ``"at"``; `options` are those of its constructor, of which `spots` and `feat_dim` are
            explained in `Setting`.
        labels: class of every training sample, integers ``[N]``, in index order.
        image_size: height and width of the images.
        logits: name of the loss at the logits, with its options and its temperature; None for the distiller's own.
        beta: weight of the distiller's losses; None for the published one.
        selection: where to distil, a name of `SELECTIONS`.
        policy: name of the policy of those selections that have one, with its options. `homogeneous` (teacher and
            student are of one family) and `gate_temperature` are explained in `PolicySetting`.
        pair: ``"teacher-student"``, for messages.
        settings: the others of `SpotAdaptiveDistillation`, e.g. ``gamma=2.0``.

    Raises:
        UserError: there is no such distiller, loss, selection or policy, it does not fit the networks, or a number is
            impossible.
    """
    # A config has been checked for these; a call from Python has not.
    if selection not in SELECTIONS:
        raise UserError(f"selection is {selection!r}, expected one of {', '.join(SELECTIONS)}")
    positive = {"temperature": temperature, "gate_temperature": gate_temperature, **settings}
    for name in ("temperature", "gate_temperature", "gamma", "balance", "routing_share"):
        if (value := positive.get(name)) is not None and not value > 0:
            raise UserError(f"{name} is {value}, expected a number above 0")
    for name, weight in {"alpha": settings.get("alpha"), "beta": beta}.items():
        if weight is not None and not 0 <= weight < math.inf:
            raise UserError(f"{name} is {weight}, expected a number from 0 on")
    labels = torch.as_tensor(labels)
    if settings.get("standardize") and len(labels) and labels.max() < 2:
        raise UserError("kd_loss.standardize: with two classes, standardised logits only say which one is larger")
    if not set(student.parameters()).isdisjoint(teacher.parameters()):
        teacher = copied(teacher)
    networks, shapes, classes = {}, {}, {}
    for role, network in {"student": student, "teacher": teacher}.items():
        try:
            networks[role] = wrap_module(network, None, image_size)
        except UserError as error:
            raise UserError(f"{role}: {error}") from error
        shapes[role], (classes[role],) = networks[role].shapes(*image_size)
    if classes["student"] != classes["teacher"]:
        raise UserError("student and teacher give {student} and {teacher} logits, expected the same".format(**classes))
    setting = Setting(**shapes, labels=labels, spots=spots, feat_dim=feat_dim, pair=pair)
    try:
        chosen_distiller = build(DISTILLERS, distiller, "kd_loss.options", options, setting)
        for role, network in networks.items():
            if network.one_piece and not chosen_distiller.logits_only:
                why = f"the {role} is one piece without features; distiller=kd distils the logits"
                raise UserError(f"{distiller}: {why}")
    except UserError as error:
        reasons = [
            f"kd.{role}.stages names stages (docs/extending.md), where the {role} is not cut further automatically: "
            f"{network.uncut}"
            for role, network in networks.items()
            if network.uncut
        ]
        raise UserError("; ".join([str(error), *reasons[:1]])) from error  # two would be long
    chosen_policy = None
    if SELECTIONS[selection].policy:
        policy_setting = PolicySetting(*shapes.values(), chosen_distiller.spots, homogeneous, gate_temperature)
        chosen_policy = build(POLICIES, policy, "kd.policy_options", policy_options, policy_setting)
    return SpotAdaptiveDistillation(
        *networks.values(),
        chosen_distiller,
        *shapes.values(),
        selection=selection,
        policy=chosen_policy,
        beta=chosen_distiller.default_weight if beta is None else beta,
        logit_loss=build(
            LOGIT_LOSSES, logits or chosen_distiller.logit_loss, "kd_loss.logits_options", logits_options, temperature
        ),
        **settings,
    )
