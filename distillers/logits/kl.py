"""Hinton's distillation: the divergence of the softened class probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets.batch import Batch
from distillers.logits.base import LogitLoss
from distillers.logits.registry import register_logit_loss
from distillers.ops.masking import masked_mean
from distillers.ops.precision import at_least


@at_least(torch.float32)
def distillation_kl(student: Tensor, teacher: Tensor, gate: Tensor, temperature: float) -> Tensor:
    """KL divergence of the softened class probabilities over the chosen samples, a scalar.

    Hinton, Vinyals, Dean: *Distilling the Knowledge in a Neural Network*, 2015, arXiv 1503.02531.

    Args:
        student, teacher: logits ``[B, num_classes]``.
        gate: ``[B]``, 1 where the sample is distilled.
        temperature: both logits are divided by it, and the loss multiplied by its square.
    """
    log_p_s = F.log_softmax(student / temperature, dim=1)
    log_p_t = F.log_softmax(teacher / temperature, dim=1)
    per_sample = F.kl_div(log_p_s, log_p_t, log_target=True, reduction="none").sum(dim=1)
    return masked_mean(per_sample, gate) * temperature**2


@register_logit_loss("kl")
class KL(LogitLoss):
    """Divergence of the softened class probabilities."""

    label = "kl"

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        return distillation_kl(student, teacher, gate, self.temperature)
