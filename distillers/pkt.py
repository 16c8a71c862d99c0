"""Probabilistic knowledge transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from distillers.base import Distiller
from distillers.ops import at_least, masked_pair_mean
from distillers.registry import register_distiller

EPS = 1e-7


# The loss is about 1e-6, the difference of terms of about 1e-2, and its weight is 30000: float32 would add noise.
@at_least(torch.float64)
def pkt_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Divergence of the distributions over the neighbours of each sample.

    Passalis, Tefas: *Learning Deep Representations with Probabilistic Knowledge Transfer*, ECCV 2018,
    arXiv 1803.10837.

    Args:
        student, teacher: features ``[B, ...]`` of any shapes; only samples of one network are compared.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    p_student, p_teacher = neighbour_probabilities(student, gate), neighbour_probabilities(teacher, gate)
    divergence = p_teacher * ((p_teacher + EPS) / (p_student + EPS)).log()
    return masked_pair_mean(divergence, gate)


def neighbour_probabilities(feature: Tensor, gate: Tensor) -> Tensor:
    """``[B, B]``: each row a distribution over the chosen samples, proportional to ``(cosine + 1) / 2``."""
    flat = feature.flatten(1)
    unit = flat / (torch.linalg.vector_norm(flat, dim=1, keepdim=True) + EPS)
    similarity = (unit @ unit.T + 1) / 2 * gate
    # A chosen sample adds about 1 to its own row, so the clamp is for rows of others and for no sample chosen.
    return similarity / similarity.sum(dim=1, keepdim=True).clamp_min(EPS)


@register_distiller("pkt")
class PKT(Distiller):
    """Neighbourhoods of the pooled vectors."""

    default_weight = 30000.0
    loss = staticmethod(pkt_loss)
    published_spots = ((-1, -1),)
