"""Variational information distillation."""

from __future__ import annotations

import math
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, masked_mean, pool_to_match
from distillers.registry import register_distiller

MIN_VARIANCE = 1e-5


@at_least(torch.float32)
def vid_loss(mean: Tensor, rho: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Negative log-likelihood of the teacher's map under a Gaussian predicted by the student, constants left out.

    Ahn, Hu, Damianou, Lawrence, Dai: *Variational Information Distillation for Knowledge Transfer*, CVPR 2019,
    arXiv 1904.05835.

    Args:
        mean: the Gaussian's mean, ``[B, C, H, W]``, computed from the student's map.
        rho: ``[C]``; its softplus is the variance of each channel.
        teacher: ``[B, C, H, W]``.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    variance = F.softplus(rho) + MIN_VARIANCE
    # The variance is that of a channel: averaging over positions first leaves little to divide.
    error = _MeanSquare.apply(mean - teacher)
    return masked_mean((error / variance + variance.log()).mean(dim=1) / 2, gate)


class _MeanSquare(torch.autograd.Function):
    """``x²`` averaged over positions, ``[B, C, H, W]`` to ``[B, C]``.

    The gradient of a mean over positions is an expanded map, whose strides are not channels_last. Arithmetic of it and
    of maps that are channels_last is slow, so here it is never made. (`global_pool` of the squares keeps the layout
    too, but makes more maps: on two cores the whole loss takes 18 % longer.)
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square().mean(dim=(2, 3))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x * (gradient * (2 / x[0, 0].numel()))[:, :, None, None]


def mean_network(channels_in: int, channels_out: int) -> nn.Sequential:
    """Three 1x1 convolutions without bias, ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, kernel_size=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, kernel_size=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, kernel_size=1, bias=False),
    )


@register_distiller("vid")
class VID(Distiller):
    """Variational information at all middle features.

    Args:
        variance: what the variances start from.
    """

    default_weight = 1.0
    maps_only = True

    def __init__(self, setting: Setting, *, variance: Annotated[float, Field(gt=MIN_VARIANCE)] = 5.0):
        super().__init__(setting)
        softplus = variance - MIN_VARIANCE
        rho = softplus + math.log(-math.expm1(-softplus))
        self.means = nn.ModuleList(mean_network(setting.student[s][0], setting.teacher[t][0]) for s, t in self.spots)
        self.rhos = nn.ParameterList(torch.full(setting.teacher[t][:1], rho) for _, t in self.spots)

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        student, teacher = pool_to_match(student, teacher)
        return vid_loss(self.means[k](student), self.rhos[k], teacher, gate)
