"""Neuron selectivity transfer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from distillers.base import Distiller
from distillers.ops import at_least, masked_mean, pool_to_match
from distillers.registry import register_distiller


@at_least(torch.float32)
def nst_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Squared maximum mean discrepancy of the channels of both networks, under the kernel ``k(a, b) = (a . b)²``.

    Huang, Wang: *Like What You Like: Knowledge Distill via Neuron Selectivity Transfer*, 2017, arXiv 1707.01219.

    Args:
        student, teacher: maps ``[B, C, H, W]``; widths and sizes may differ.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    student, teacher = (F.normalize(x.flatten(2), dim=2) for x in pool_to_match(student, teacher))
    c_student, c_teacher, positions = student.shape[1], teacher.shape[1], student.shape[2]
    # Multiplications of the two ways to the same number, over `positions`. On a core of a CPU, batch 64, forward and
    # backward, the second takes 1/30 of the time at 96 and 1024 channels of 8x8, 1/500 at 160 and 2048 of 4x4.
    by_positions = positions * (c_student + c_teacher)
    by_channels = c_student**2 + c_student * c_teacher + c_teacher**2
    discrepancy = discrepancy_by_positions if by_positions < by_channels else discrepancy_by_channels
    return masked_mean(discrepancy(student, teacher), gate)


def discrepancy_by_channels(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean kernel values within and across the networks, ``[B, C_s, P]`` and ``[B, C_t, P]`` to ``[B]``."""

    def mean_kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT).square().mean(dim=(1, 2))

    return mean_kernel(student, student) + mean_kernel(teacher, teacher) - 2 * mean_kernel(student, teacher)


def discrepancy_by_positions(student: Tensor, teacher: Tensor) -> Tensor:
    """`discrepancy_by_channels`, computed from matrices of positions: a sum of ``(a . b)²`` over all channel pairs is
    the inner product of ``Aᵀ A`` and ``Bᵀ B``, so the three terms are the square of one difference."""
    teacher_gram = teacher.mT @ teacher / teacher.shape[1]
    difference = torch.baddbmm(teacher_gram, student.mT, student, beta=-1, alpha=1 / student.shape[1])
    return difference.square().sum(dim=(1, 2))


@register_distiller("nst")
class NST(Distiller):
    """Selectivity of the channels of all middle features."""

    default_weight = 50.0
    loss = staticmethod(nst_loss)
    maps_only = True
