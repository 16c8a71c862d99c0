"""FitNets: regress the teacher's feature from the student's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, masked_mean
from distillers.registry import register_distiller
from models.adapter import make_adapter


@at_least(torch.float32)
def fitnet_loss(regressed: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean squared error of the regressed feature.

    Romero, Ballas, Ebrahimi Kahou, Chassang, Gatta, Bengio: *FitNets: Hints for Thin Deep Nets*, ICLR 2015,
    arXiv 1412.6550.

    Args:
        regressed: the student's feature, brought to the shape of the teacher's.
        teacher: ``[B, C, H, W]`` or ``[B, D]``.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    return masked_mean((regressed - teacher).square().flatten(1).mean(dim=1), gate)


@register_distiller("fitnet")
class FitNet(Distiller):
    """Hints at feature 2, through a regressor that is trained with the student."""

    default_weight = 1.0
    published_spots = ((2, 2),)

    def __init__(self, setting: Setting):
        super().__init__(setting)
        self.regressors = nn.ModuleList(make_adapter(setting.student[s], setting.teacher[t]) for s, t in self.spots)

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        # The regressor sees the whole batch: its BatchNorm statistics must not depend on the gates.
        return fitnet_loss(self.regressors[k](student), teacher, gate)
