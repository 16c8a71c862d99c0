"""Policies: they decide for each sample, in every step, where to distil. The published one is `Gumbel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillers.base import Shape, Spot
from distillers.registry import register_policy

TEACHER_ROUTE = 0  # entry of each pair of policy logits that stands for "through the teacher", i.e. "distil here"
HOMOGENEOUS_BIAS = 10.0
ROUNDING = 1e-5  # of a gate computed as hard - soft.detach() + soft


class Seen(NamedTuple):
    """What a policy may look at, of one batch. Nothing here has a gradient: the policy must not move the networks.

    Attributes:
        student, teacher: all features of both networks, ``[B, C, H, W]``, under autocast perhaps in half precision; the
            last one is the pooled vector ``[B, D]``, in float32 at least.
        student_logits, teacher_logits: ``[B, num_classes]``, in float32 at least.
        label: ``[B]``.
        epoch: counted from 0, a scalar tensor on the device. It is filled in place, so a captured step may read it.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    student_logits: Tensor
    teacher_logits: Tensor
    label: Tensor
    epoch: Tensor

    @property
    def pooled(self) -> Tensor:
        """Both networks' pooled vectors side by side, ``[B, PolicySetting.pooled_size]``."""
        return torch.cat([self.teacher[-1], self.student[-1]], dim=1)


@dataclass(frozen=True)
class PolicySetting:
    """What a policy may know when it is built.

    Attributes:
        student, teacher: shape of every feature without the batch dimension: ``(C, H, W)``, or ``(D,)`` for the pooled
            vector, which is the last one.
        spots: where the distiller distils, indices of a student feature and of a teacher feature.
        homogeneous: teacher and student are of one family.
        gate_temperature: ``kd.gate_temperature``.
    """

    student: Sequence[Shape]
    teacher: Sequence[Shape]
    spots: Sequence[Spot]
    homogeneous: bool = False
    gate_temperature: float = 5.0

    @property
    def num_gates(self) -> int:
        """One gate per spot, and the last one for the logits."""
        return len(self.spots) + 1

    @property
    def pooled_size(self) -> int:
        """Width of `Seen.pooled`."""
        return self.teacher[-1][0] + self.student[-1][0]


class Policy(nn.Module):
    """Base class of the policies. A subclass overrides `draw_gates`, and its constructor if it needs the setting. Its
    options are keyword arguments of the constructor, ``kd.policy_options``.

    Args:
        setting: of the experiment.

    Attributes:
        capturable: see `distillers.base.Distiller`.
        binary: every gate is exactly 0 or 1 by construction; otherwise gates pass through `exact_gates`.
    """

    capturable: ClassVar[bool] = True
    binary: ClassVar[bool] = False

    def __init__(self, setting: PolicySetting):
        super().__init__()
        self.setting = setting

    @property
    def routed(self) -> bool:
        """Whether steps have a routed pass, whose loss trains the policy, see `distillers.spot_adaptive.routing`. A
        policy without parameters to train needs none, and costs next to nothing."""
        return any(parameter.requires_grad for parameter in self.parameters())

    def draw_gates(self, seen: Seen) -> Tensor:
        """Gates ``[B, K + 1]``, 1 where the sample is distilled and 0 where not; the last column is that of the logits.

        Where parameters are to learn, the gates carry their gradient. Autocast is off.
        """
        raise NotImplementedError

    def chances(self, seen: Seen) -> Tensor:
        """Probability that each gate is 1, ``[B, K + 1]``, for `utils.inspect_gates`. A policy that does not say it
        gives the gates of one draw."""
        return self.draw_gates(seen)


@register_policy("gumbel")
class Gumbel(Policy):
    """One linear layer from both networks' pooled vectors to two logits per gate (Song et al., TIP 2022).

    For a homogeneous pair the gates start almost surely at "distil".
    """

    binary = True

    def __init__(self, setting: PolicySetting):
        super().__init__(setting)
        self.linear = nn.Linear(setting.pooled_size, 2 * setting.num_gates)
        if setting.homogeneous:
            with torch.no_grad():
                self.linear.bias.view(-1, 2)[:, TEACHER_ROUTE] += HOMOGENEOUS_BIAS

    def forward(self, seen: Seen) -> Tensor:
        """Policy logits, ``[B, num_gates, 2]``."""
        return self.linear(seen.pooled).unflatten(1, (-1, 2))

    def draw_gates(self, seen: Seen) -> Tensor:
        return straight_through_gates(self(seen), self.setting.gate_temperature)

    def chances(self, seen: Seen) -> Tensor:
        # The gate is the larger of two logits after Gumbel noise, so its distribution is the softmax at temperature 1,
        # whatever the temperature that the training uses for its gradient.
        return self(seen).softmax(dim=-1)[..., TEACHER_ROUTE]


def straight_through_gates(logits: Tensor, temperature: float) -> Tensor:
    """Draw gates from policy logits by the straight-through Gumbel-softmax.

    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017.

    Args:
        logits: ``[B, num_gates, 2]``.
        temperature: of the softmax whose gradient stands in for that of the hard choice.

    Returns:
        ``[B, num_gates]``: exactly 1 (distil) or 0 forward, the soft choice's gradient backward.
    """
    # The exponential is exactly 0 once in a few million draws, and -log(0) would turn the softmax into NaN.
    noise = -torch.empty_like(logits).exponential_().clamp_min(torch.finfo(logits.dtype).tiny).log()
    soft = F.softmax((logits + noise) / temperature, dim=-1)[..., TEACHER_ROUTE]
    hard = (soft >= 0.5).to(soft.dtype)
    # This order adds an exact zero, so that the gate is a true 0 or 1; hard - soft.detach() + soft can be an ulp off.
    return hard + (soft - soft.detach())


def exact_gates(gates: Tensor) -> Tensor:
    """`gates` rounded to exactly 0 or 1, with the same gradient. NaN where one is neither, so that the epoch ends.

    Nothing here waits for the device, and a captured step does it as well.
    """
    hard = (gates.detach() > 0.5).to(gates.dtype)
    fine = (gates.detach() - hard).abs() < ROUNDING
    return hard.where(fine, torch.nan) + (gates - gates.detach())
