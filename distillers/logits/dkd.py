"""Decoupled knowledge distillation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from distillers.logits.base import LogitLoss, check_weight
from distillers.logits.registry import register_logit_loss
from distillers.ops.masking import masked_mean
from distillers.ops.precision import at_least


@at_least(torch.float32)
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    gate: Tensor,
    label: Tensor,
    *,
    temperature: float,
    target: float,
    nontarget: float,
) -> Tensor:
    """Divergence of the target class against all others, and that of the others among themselves, weighted apart.

    Zhao, Cui, Song, Qiu, Liang: *Decoupled Knowledge Distillation*, CVPR 2022, arXiv 2203.08679.

    Args:
        student, teacher: logits ``[B, num_classes]``.
        gate: ``[B]``, 1 where the sample is distilled.
        label: the target class of each sample, ``[B]``.
        temperature: both logits are divided by it, and the loss multiplied by its square.
        target, nontarget: weights of the two parts.
    """
    is_target = torch.arange(student.shape[1], device=label.device) == label[:, None]
    odds_s, log_others_s = split_target(student / temperature, is_target)
    odds_t, log_others_t = split_target(teacher / temperature, is_target)
    p_t = odds_t.sigmoid()
    of_target = p_t * (F.logsigmoid(odds_t) - F.logsigmoid(odds_s))
    of_target = of_target + (1 - p_t) * (F.logsigmoid(-odds_t) - F.logsigmoid(-odds_s))
    # At the target both logarithms are minus infinity, and so is no difference of theirs.
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
    """Target class and other classes apart. The published weight of the other classes depends on the pair: 6 or 2 for
    some, see ``configs/cifar-100/``.

    Args:
        temperature: see `LogitLoss`.
        target, nontarget: weights of the two parts.
    """

    warmup_epochs = 20

    def __init__(self, temperature: float = 4.0, *, target: float = 1.0, nontarget: float = 8.0):
        super().__init__(temperature)
        check_weight("dkd.target", target)
        check_weight("dkd.nontarget", nontarget)
        self.weights = {"target": target, "nontarget": nontarget}

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        return dkd_loss(student, teacher, gate, batch.label, temperature=self.temperature, **self.weights)
