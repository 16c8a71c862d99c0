"""Attention transfer."""

from __future__ import annotations

import torch
from torch import Tensor

from distillers.base import Distiller
from distillers.ops import at_least, attention, masked_mean, pool_to_match
from distillers.registry import register_distiller


@at_least(torch.float32)
def at_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of the attention maps of both networks.

    Zagoruyko, Komodakis: *Paying More Attention to Attention: Improving the Performance of Convolutional Neural
    Networks via Attention Transfer*, ICLR 2017, arXiv 1612.03928.

    Args:
        student, teacher: maps ``[B, C, H, W]``; widths and sizes may differ.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    student, teacher = pool_to_match(student, teacher)
    difference = attention(student) - attention(teacher)
    return masked_mean(difference.square().mean(dim=1), gate)


@register_distiller("at")
class AT(Distiller):
    """Attention transfer at all middle features."""

    default_weight = 1000.0
    loss = staticmethod(at_loss)
    maps_only = True
