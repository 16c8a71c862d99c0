"""What can be matched at the logits, under any distiller (``kd_loss.logits``) or alone (`distillers.kd`).

All are losses over the chosen samples, times the chosen share ``n / B``; ``gate`` is ``[B]``, 1 where the sample is
chosen, and ``student`` and ``teacher`` are logits ``[B, num_classes]``.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat, PositiveFloat
from torch import Tensor, nn
from torch.linalg import vector_norm

from datasets.batch import Batch
from distillers.ops import at_least, chosen_count, masked_mean
from distillers.registry import LOGIT_LOSSES, register_logit_loss

__all__ = ["LOGIT_LOSSES", "LogitLoss", "register_logit_loss"]

CORRELATION_EPS = 1e-8  # of the published code of DIST: two constants correlate 0
STANDARD_EPS = 1e-7  # of the published code
# A classifier that begins at zero gives logits without deviation. The published form divides them by 1e-7, and its
# gradient of 1e7 ruins the student. Other networks stay far above this.
LEAST_DEVIATION = 0.01


class LogitLoss(nn.Module):
    """Base class of what is matched at the logits. A subclass names its `function`, or overrides `forward` if it needs
    more. Modules that it assigns to itself are trained together with the student.

    Args:
        temperature: by which logits are divided before the softmax, ``kd_loss.KD_T``.
        constants: keyword arguments of `function` that the user changes, ``kd_loss.logits_options``.

    Attributes:
        function: called as ``function(student, teacher, gate, ...)``, with ``label``, ``[B]``, and ``temperature`` if
            it has arguments of these names. Its other arguments are the constants of the method, with the published
            values as defaults.
        label: what it is called in logs, ``"loss/<label>"``.
        warmup_epochs: over how many epochs its weight α grows to its full value, if the config does not say.
        capturable: see `distillers.base.Distiller`.
    """

    function: ClassVar[Callable[..., Tensor] | None] = None
    label: ClassVar[str] = "logits"
    warmup_epochs: ClassVar[int] = 0
    capturable: ClassVar[bool] = True

    def __init__(self, temperature: float = 4.0, **constants: float):
        super().__init__()
        self.temperature, self.constants = temperature, constants

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        """Loss over the chosen samples, times the chosen share ``n / B``; a scalar.

        Args:
            student, teacher: logits ``[B, num_classes]``; the teacher's are detached.
            gate: ``[B]``, 1 where the sample is chosen. With none chosen the loss is 0, never NaN.
            batch: has the labels.
        """
        function, known = type(self).function, {"temperature": self.temperature, "label": batch.label}
        asked = {name: value for name, value in known.items() if name in inspect.signature(function).parameters}
        return function(student, teacher, gate, **asked, **self.constants)


@at_least(torch.float32)
def standardized(logits: Tensor) -> Tensor:
    """Logits ``[B, num_classes]`` with mean 0 and standard deviation 1 in each sample, see `LEAST_DEVIATION`.

    Sun, Ren, Li, Wang, Cao: *Logit Standardization in Knowledge Distillation*, CVPR 2024, arXiv 2403.01427.
    """
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    return (logits - mean) / (deviation.clamp_min(LEAST_DEVIATION) + STANDARD_EPS)


@at_least(torch.float32)
def distillation_kl(student: Tensor, teacher: Tensor, gate: Tensor, temperature: float) -> Tensor:
    """KL divergence of the class probabilities, both logits divided by `temperature`, times its square.

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.
    """
    log_p_s = F.log_softmax(student / temperature, dim=1)
    log_p_t = F.log_softmax(teacher / temperature, dim=1)
    per_sample = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="none").sum(dim=1)
    return masked_mean(per_sample, gate) * temperature**2


@register_logit_loss("kl")
class KL(LogitLoss):
    function = staticmethod(distillation_kl)
    label = "kl"


@at_least(torch.float32)
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    label: Tensor,
    *,
    temperature: float,
    target: NonNegativeFloat = 1.0,
    nontarget: NonNegativeFloat = 8.0,
) -> Tensor:
    """Divergence of the target class against all others, and that of the others among themselves, weighted apart.

    Zhao, Cui, Song, Qiu, Liang: *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679.

    Args:
        label: the target class of each sample, ``[B]``.
        temperature: both logits are divided by it, and the loss multiplied by its square.
        target, nontarget: weights of the two parts. The published weight of the other classes depends on the pair: 6 or
            2 for some, see ``configs/cifar-100/``.
    """
    is_target = torch.arange(student.shape[1], device=label.device) == label[:, None]
    odds_s, log_others_s = split_target(student / temperature, is_target)
    odds_t, log_others_t = split_target(teacher / temperature, is_target)
    p_t = odds_t.sigmoid()
    of_target = p_t * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
    of_target = of_target + (1 - p_t) * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    # At the target both logarithms are -inf, and -inf minus -inf is NaN, so it is masked.
    difference = (log_others_t - log_others_s).masked_fill(is_target, 0)
    of_others = (log_others_t.exp() * difference).sum(dim=1)
    return masked_mean(target * of_target + nontarget * of_others, gate) * temperature**2


def split_target(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds of the target class, ``[B]``, and log-softmax over the other classes, ``[B, num_classes]``.

    From the odds, the probability of the target and that of all others follow without rounding errors, also where one
    of the two is almost 1. The second result is minus infinity at the target.
    """
    others = logits.masked_fill(is_target, -math.inf)
    odds = logits.masked_fill(~is_target, 0).sum(dim=1) - others.logsumexp(dim=1)
    return odds, F.log_softmax(others, dim=1)


@register_logit_loss("dkd")
class DKD(LogitLoss):
    function = staticmethod(dkd_loss)
    warmup_epochs = 20


@at_least(torch.float32)
def dist_loss(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    *,
    temperature: float,
    inter: NonNegativeFloat = 1.0,
    intra: NonNegativeFloat = 1.0,
) -> Tensor:
    """How far from linearly related the probabilities of both networks are: those of one sample over the classes
    (inter-class), and those of one class over the chosen samples (intra-class).

    Huang, You, Wang, Qian, Xu: *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, arXiv 2205.10536.

    Args:
        temperature: both logits are divided by it, and the loss multiplied by its square.
        inter, intra: weights of the two parts; 2 each in the paper's runs on ImageNet.
    """
    p_s, p_t = (student / temperature).softmax(dim=1), (teacher / temperature).softmax(dim=1)
    of_samples = 1 - correlation(p_s - p_s.mean(dim=1, keepdim=True), p_t - p_t.mean(dim=1, keepdim=True), dim=1)
    of_classes = 1 - correlation(over_chosen(p_s, gate), over_chosen(p_t, gate), dim=0)
    loss = inter * masked_mean(of_samples, gate) + intra * of_classes.mean() * gate.mean()
    return loss * temperature**2


def over_chosen(p: Tensor, gate: Tensor) -> Tensor:
    """`p`, ``[B, C]``, less its mean over the chosen samples, and 0 at the others."""
    gate = gate[:, None]
    return (p - (p * gate).sum(dim=0) / chosen_count(gate)) * gate


def correlation(first: Tensor, second: Tensor, dim: int) -> Tensor:
    """Pearson's, along `dim`, of what has mean 0 there."""
    return (first * second).sum(dim) / (vector_norm(first, dim=dim) * vector_norm(second, dim=dim) + CORRELATION_EPS)


@register_logit_loss("dist")
class DIST(LogitLoss):
    function = staticmethod(dist_loss)


@at_least(torch.float32)
def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    label: Tensor,
    *,
    gamma: NonNegativeFloat = 1.5,
    tau: PositiveFloat = 1.0,
) -> Tensor:
    """Cross-entropy with the target class, weighted by the teacher's probability of it, and cross-entropy of the other
    classes among themselves, each network's normalised to a sum of 1.

    Yang, Zeng, Li, Zhang, Yuan, Li: *From Knowledge Distillation to Self-Knowledge Distillation*, ICCV 2023,
    arXiv 2303.13005.

    Args:
        label: the target class of each sample, ``[B]``.
        gamma: weight of the other classes.
        tau: their temperature; their part is multiplied by its square. The target's part has none.
    """
    is_target = torch.arange(student.shape[1], device=label.device) == label[:, None]
    # Not z[is_target], whose size a GPU would have to tell the host.
    log_target_s, log_target_t = (z.log_softmax(dim=1).gather(1, label[:, None])[:, 0] for z in (student, teacher))
    of_target = -log_target_t.exp() * log_target_s
    (_, log_others_s), (_, log_others_t) = (split_target(z / tau, is_target) for z in (student, teacher))
    # At the target both logarithms are -inf, and 0 times -inf is NaN, so it is masked.
    of_others = -(log_others_t.exp() * log_others_s.masked_fill(is_target, 0)).sum(dim=1)
    return masked_mean(of_target + gamma * tau**2 * of_others, gate)


@register_logit_loss("nkd")
class NKD(LogitLoss):
    function = staticmethod(nkd_loss)


@at_least(torch.float32)
def wttm_loss(student: Tensor, teacher: Tensor, gate: Tensor, *, power: NonNegativeFloat = 0.2) -> Tensor:
    """KL divergence from the teacher's probabilities raised to `power` and normalised; the student has no temperature.
    Each sample is weighted by the sum of these powers, which is large where the teacher is unsure.

    Zheng, Yang: *Knowledge Distillation Based on Transformed Teacher Matching*, ICLR 2024, arXiv 2402.11148. Its
    weight α is 4 or more, by pair.

    Args:
        power: 1 over the teacher's temperature.
    """
    powers = power * teacher.log_softmax(dim=1)
    log_total = powers.logsumexp(dim=1, keepdim=True)
    log_q = powers - log_total
    divergence = (log_q.exp() * (log_q - student.log_softmax(dim=1))).sum(dim=1)
    return masked_mean(log_total.squeeze(1).exp() * divergence, gate)


@register_logit_loss("wttm")
class WTTM(LogitLoss):
    function = staticmethod(wttm_loss)


for _name in ("base", "registry", "kl", "dkd", "dist"):
    sys.modules[f"{__name__}.{_name}"] = sys.modules[__name__]  # the old names, until 2027-06
