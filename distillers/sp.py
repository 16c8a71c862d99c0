"""Similarity-preserving distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillers.base import Distiller
from distillers.ops import at_least, masked_pair_mean
from distillers.registry import register_distiller


@at_least(torch.float32)
def sp_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of the sample-by-sample similarity matrices of both networks.

    Tung, Mori: *Similarity-Preserving Knowledge Distillation*, ICCV 2019, arXiv 1907.09682.

    Args:
        student, teacher: features ``[B, ...]`` of any shapes; only samples of one network are compared.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    difference = similarities(teacher, gate) - similarities(student, gate)
    return masked_pair_mean(difference.square(), gate)


def similarities(feature: Tensor, gate: Tensor) -> Tensor:
    """``[B, B]``: dot products of every sample with the chosen ones, each row scaled to unit length."""
    flat = feature.flatten(1)
    return F.normalize(flat @ flat.T * gate, dim=1)


@register_distiller("sp")
class SP(Distiller):
    """Similarities at the second-last feature."""

    default_weight = 3000.0
    loss = staticmethod(sp_loss)
    published_spots = ((-2, -2),)
