"""Correlation congruence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, linear_embedding
from distillers.registry import register_distiller


@at_least(torch.float32)
def cc_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean product of the embedding errors of consecutive chosen samples.

    Peng, Jin, Liu, Zhou, Wu, Liu, Zhou, Zhang: *Correlation Congruence for Knowledge Distillation*, ICCV 2019,
    arXiv 1904.01802, in the short form of the published spot-adaptive experiments.

    Args:
        student, teacher: embeddings ``[B, D]``.
        gate: ``[B]``, 1 where the sample is chosen. A single sample has no neighbour: 0.
    """
    # Neighbours are neighbours among the chosen: these come first, in the order of the batch.
    order = gate.argsort(descending=True, stable=True)
    error = (student - teacher).abs().index_select(0, order)
    products = (error[:-1] * error[1:]).sum(dim=1)
    is_pair = gate.index_select(0, order)[1:]  # a pair is chosen if its second sample is
    chosen = gate.sum()
    return is_pair @ products / (chosen - 1).clamp_min(1) * chosen / gate.shape[0]


@register_distiller("cc")
class CC(Distiller):
    """Correlation of the pooled vectors, embedded linearly in a common space.

    The student's embedding is trained. The teacher's is a fixed target: without a gradient, the optimiser in which it
    stands passes over it, its weight decay included. (Trained on both sides, the loss would have the trivial minimum of
    two embeddings that collapse; and a target that decayed to nothing would take the student's with it.)
    """

    default_weight = 0.02
    published_spots = ((-1, -1),)

    def __init__(self, setting: Setting):
        super().__init__(setting)
        width = setting.feat_dim
        self.student = nn.ModuleList(linear_embedding(setting.student[spot.student], width) for spot in self.spots)
        self.teacher = nn.ModuleList(linear_embedding(setting.teacher[spot.teacher], width) for spot in self.spots)

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            target = self.teacher[k](teacher)
        return cc_loss(self.student[k](student), target, gate)
