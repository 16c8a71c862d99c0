"""Knowledge review."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting, all_middle
from distillers.ops import at_least, masked_mean
from distillers.registry import register_distiller
from models.pooling import average_pool

WIDEST = 512  # channels in which levels are fused
CONTEXTS = (4, 2, 1)  # sizes to which maps are pooled


@at_least(torch.float32)
def hierarchical_context_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of two maps and of their poolings to those of 4x4, 2x2 and 1x1 that are smaller than the
    map. It is a weighted mean, in which each size counts half as much as the one before.

    Chen, Liu, Zhao, Jia: *Distilling Knowledge via Knowledge Review*, CVPR 2021, arXiv 2104.09044.

    Args:
        student, teacher: maps ``[B, C, H, W]`` of one shape.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    side = min(student.shape[2:])
    loss, weight, total = per_sample_error(student, teacher), 1.0, 1.0
    for size in (size for size in CONTEXTS if size < side):
        weight /= 2
        pooled = average_pool(student, size, size), average_pool(teacher, size, size)
        loss, total = loss + weight * per_sample_error(*pooled), total + weight
    return masked_mean(loss / total, gate)


def per_sample_error(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared difference of each sample, ``[B]``."""
    return (first - second).square().flatten(1).mean(dim=1)


class Fusion(nn.Module):
    """Attention-based fusion (ABF) of a student feature with what the deeper levels have left.

    Args:
        channels: of the student's feature.
        width: in which levels are fused.
        target: shape ``(C, H, W)`` of the map to give.
        deepest: there is no deeper level.
    """

    def __init__(self, channels: int, width: int, target: Sequence[int], *, deepest: bool):
        super().__init__()
        self.size = tuple(target[1:])
        self.enter = convolution(channels, width, 1)
        self.attention = None if deepest else nn.Conv2d(2 * width, 2, kernel_size=1)
        self.leave = convolution(width, target[0], 3)

    def forward(self, feature: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """The map to compare with the teacher's, and the residual for the next level, ``[B, width, H, W]``.

        Args:
            feature: ``[B, channels, h, w]``.
            residual: of the level above, ``[B, width, *, *]``; None at the deepest.
        """
        fused = self.enter(feature)
        if self.attention is not None:
            residual = F.interpolate(residual, fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, residual], dim=1)).sigmoid()
            fused = fused * share[:, :1] + residual * share[:, 1:]
        if fused.shape[2:] != self.size:
            fused = F.interpolate(fused, self.size, mode="nearest")
        return self.leave(fused), fused


def convolution(channels_in: int, channels_out: int, kernel: int) -> nn.Sequential:
    """Convolution without bias that keeps the size, and BatchNorm."""
    layer = nn.Conv2d(channels_in, channels_out, kernel, padding=kernel // 2, bias=False)
    nn.init.kaiming_uniform_(layer.weight, a=1)
    return nn.Sequential(layer, nn.BatchNorm2d(channels_out))


@register_distiller("reviewkd")
class ReviewKD(Distiller):
    """Review of all middle features and the pooled vector, from the deepest to the shallowest: what the student knows
    at one level is compared with the teacher after it is fused with what it knows at the deeper ones.

    A level's gate decides on its own loss. The fusion sees every sample at every level.
    """

    default_weight = 1.0
    warmup_epochs = 20

    def __init__(self, setting: Setting):
        super().__init__(setting)
        width = min(WIDEST, setting.student[self.spots[-1].student][0])
        self.fusions = nn.ModuleList(
            Fusion(
                setting.student[spot.student][0],
                width,
                as_map_shape(setting.teacher[spot.teacher]),
                deepest=spot == self.spots[-1],
            )
            for spot in self.spots
        )

    def default_spots(self, setting: Setting) -> list[tuple[int, int]]:
        return [*all_middle(setting), (-1, -1)]

    def forward(self, student: Sequence[Tensor], teacher: Sequence[Tensor], gates: Tensor, batch: Batch) -> Tensor:
        losses, residual = [], None
        for k in reversed(range(len(self.spots))):
            spot = self.spots[k]
            fused, residual = self.fusions[k](as_map(student[spot.student]), residual)
            target = as_map(teacher[spot.teacher].detach())
            losses.append(hierarchical_context_loss(fused, target, gates[:, k]))
        return torch.stack(losses[::-1])


def as_map(feature: Tensor) -> Tensor:
    """A pooled vector ``[B, D]`` as a map of one position."""
    return feature if feature.dim() == 4 else feature[:, :, None, None]


def as_map_shape(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(shape) if len(shape) == 3 else (*shape, 1, 1)
