"""Distillation from a stronger teacher."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from datasets.batch import Batch
from distillers.logits.base import LogitLoss, check_weight
from distillers.logits.registry import register_logit_loss
from distillers.ops.masking import chosen_count, masked_mean
from distillers.ops.precision import at_least

EPS = 1e-8  # of the published code: two constants correlate 0


@at_least(torch.float32)
def dist_loss(
    student: Tensor, teacher: Tensor, gate: Tensor, *, temperature: float, inter: float, intra: float
) -> Tensor:
    """How far from linearly related the probabilities of both networks are: those of one sample over the classes
    (inter-class), and those of one class over the chosen samples (intra-class).

    Huang, You, Wang, Qian, Xu: *Knowledge Distillation from A Stronger Teacher*, NeurIPS 2022, arXiv 2205.10536.

    Args:
        student, teacher: logits ``[B, num_classes]``.
        gate: ``[B]``, 1 where the sample is distilled.
        temperature: both logits are divided by it, and the loss multiplied by its square.
        inter, intra: weights of the two parts.
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
    return (first * second).sum(dim) / (vector_norm(first, dim=dim) * vector_norm(second, dim=dim) + EPS)


@register_logit_loss("dist")
class DIST(LogitLoss):
    """Correlations between classes and within classes.

    Args:
        temperature: see `LogitLoss`.
        inter, intra: weights of the two parts; 2 each in the paper's runs on ImageNet.
    """

    def __init__(self, temperature: float = 4.0, *, inter: float = 1.0, intra: float = 1.0):
        super().__init__(temperature)
        check_weight("dist.inter", inter)
        check_weight("dist.intra", intra)
        self.weights = {"inter": inter, "intra": intra}

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        return dist_loss(student, teacher, gate, temperature=self.temperature, **self.weights)
