"""Relational knowledge distillation: distances between pairs, angles between triplets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import NonNegativeFloat
from torch import Tensor

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, chosen_count, masked_pair_mean
from distillers.registry import register_distiller

CLAMP = 1e-12  # smallest squared distance, so that the root has a gradient
# Below this, relative to the squared norms, a squared distance is rounding: samples that float32 cannot tell apart.
COINCIDENT = 1e-13


# Distances and cosines are small differences of large dot products: in float64 nothing is lost by that, and neither
# loss needs the [B, B, D] tensor of the differences themselves.
@at_least(torch.float64)
def rkd_loss(student: Tensor, teacher: Tensor, gate: Tensor, *, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Smooth L1 between the relations of the samples in both networks.

    Park, Kim, Lu, Cho: *Relational Knowledge Distillation*, CVPR 2019, arXiv 1904.05068.

    Args:
        student, teacher: features ``[B, ...]`` of any shapes; only samples of one network are compared.
        gate: ``[B]``, 1 where the sample is chosen. A single sample has no relations: 0.
        distance, angle: weights of the two losses.
    """
    student, teacher = gram_matrix(student), gram_matrix(teacher)
    distance_loss = F.smooth_l1_loss(
        relative_distances(student, gate), relative_distances(teacher, gate), reduction="none"
    )
    angle_loss = F.smooth_l1_loss(triplet_cosines(student), triplet_cosines(teacher), reduction="none")
    # Over the third sample of a triplet first: what remains is one angle loss for every pair.
    angle_loss = angle_loss @ gate / chosen_count(gate)
    return masked_pair_mean(distance * distance_loss + angle * angle_loss, gate)


def gram_matrix(feature: Tensor) -> Tensor:
    """``[B, B]``: dot products of the flattened samples."""
    flat = feature.flatten(1)
    return flat @ flat.T


def squared_distances(gram: Tensor) -> Tensor:
    """``[B, B]``, from the dot products of the samples."""
    norms = gram.diagonal()
    return norms[:, None] + norms[None, :] - 2 * gram


def relative_distances(gram: Tensor, gate: Tensor) -> Tensor:
    """``[B, B]``: Euclidean distances, in units of the mean distance of two different chosen samples."""
    distances = squared_distances(gram).clamp_min(CLAMP).sqrt()
    distances = distances * (1 - torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    chosen = gate.sum()
    mean = gate @ distances @ gate / (chosen * (chosen - 1)).clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)


def triplet_cosines(gram: Tensor) -> Tensor:
    """``[B, B, B]``: entry ``i, j, k`` is the cosine at sample ``i`` of the angle towards ``j`` and ``k``.

    Two samples in the same place have no direction: cosines with one are 0.
    """
    norms = gram.diagonal()
    squares = squared_distances(gram)
    coincident = squares <= COINCIDENT * (norms[:, None] + norms[None, :])
    # The reciprocal root of infinity is 0, and so is its gradient.
    inverse = squares.masked_fill(coincident, torch.inf).rsqrt()
    products = gram[None, :, :] - gram[:, :, None] - gram[:, None, :] + norms[:, None, None]
    return products * inverse[:, :, None] * inverse[:, None, :]


@register_distiller("rkd")
class RKD(Distiller):
    """Relations of the pooled vectors.

    Args:
        distance, angle: weights of the two losses.
    """

    default_weight = 1.0
    published_spots = ((-1, -1),)

    def __init__(self, setting: Setting, *, distance: NonNegativeFloat = 25.0, angle: NonNegativeFloat = 50.0):
        super().__init__(setting)
        self.distance = distance
        self.angle = angle

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        return rkd_loss(student, teacher, gate, distance=self.distance, angle=self.angle)
