"""Channel statistics: a distiller of one's own, complete. Put it into distillers/ and name it ``distiller=stats``."""

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting, all_middle
from distillers.ops.masking import masked_mean
from distillers.ops.precision import at_least
from distillers.registry import register_distiller


@at_least(torch.float32)
def statistics_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared difference of every channel's mean and standard deviation over the positions of a map.

    Li, Wang, Liu, Hou: *Demystifying Neural Style Transfer*, IJCAI 2017, arXiv 1701.01036 (their BN loss).

    Args:
        student, teacher: maps ``[B, C, H, W]`` of one width; sizes may differ.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    difference = channel_statistics(student) - channel_statistics(teacher)
    return masked_mean(difference.square().mean(dim=1), gate)


def channel_statistics(feature: Tensor) -> Tensor:
    """Maps ``[B, C, H, W]`` to the mean and standard deviation of every channel, ``[B, 2C]``."""
    variance, mean = torch.var_mean(feature, dim=(2, 3), correction=0)
    # At a constant channel, as dead ReLUs leave behind, the slope of the bare root is infinite.
    return torch.cat([mean, (variance + 1e-5).sqrt()], dim=1)


@register_distiller("stats")
class ChannelStatistics(Distiller):
    """Statistics of all middle features; a 1x1 convolution, trained with the student, evens out the widths."""

    default_weight = 1.0  # beta, where the config does not say
    maps_only = True

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.widen = nn.ModuleList(nn.Conv2d(setting.student[s][0], setting.teacher[t][0], 1) for s, t in self.spots)

    def default_spots(self, setting: Setting) -> list[tuple[int, int]]:
        return all_middle(setting)

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        return statistics_loss(self.widen[k](student), teacher, gate)
