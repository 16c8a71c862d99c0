"""Balanced spots: no spot pulls at the student more than ``kd.balance`` times as hard as all that lies behind it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm

from models.staged import StagedModel
from utils.processes.group import all_sum, world_size

LOW_WEIGHT = 0.1  # the log names spots whose weight ends below this


class Balance(nn.Module):
    """Limits the gradient that the distiller sends into each feature of the student.

    Two gradients meet at a feature ``f_k`` in the backward pass: ``h_k`` from the stages behind it, of the
    cross-entropy, the loss at the logits and deeper spots, and ``g_k`` from the distiller, β included. The student's
    earlier stages get ``h_k + w_k g_k`` with ``w_k = min(1, cap / r_k)`` and ``r_k = ‖g_k‖ / ‖h_k‖``; the norms are
    those of the whole batch, of all processes. So β is an upper limit. The distiller's own modules get their whole
    gradient.

    Nothing is computed besides the norms, and nothing is kept from one step to the next: batches differ. Under SP, the
    last batch of an epoch, of 8 images, pulls six times as hard as the others, which ratios that were smoothed over
    steps did not limit; it ended two points lower with them.

    Args:
        cap: ``kd.balance``.
        features: number of the student's features.

    Attributes:
        ratio: ``r_k`` after the backward pass, ``[features]``; 0 before it, and where the distiller sends nothing.
        weight: ``w_k``; then 1.
    """

    ratio: Tensor
    weight: Tensor

    def __init__(self, cap: float, features: int):
        super().__init__()
        self.cap = cap
        self.register_buffer("ratio", torch.zeros(features), persistent=False)
        self.register_buffer("weight", torch.ones(features), persistent=False)

    def features(self, student: StagedModel, image: Tensor) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The student's features, the same features for the distiller, and the logits."""
        self.ratio.zero_()
        self.weight.fill_(1)
        features, for_distiller = [], []
        for index in range(len(self.ratio)):
            feature = student.run(image, index, index + 1)
            image, view = _Fork.apply(feature, self.cap, self.ratio[index], self.weight[index])
            features.append(image)
            for_distiller.append(view)
        return features, for_distiller, student.run(image, len(self.ratio))


class _Fork(torch.autograd.Function):
    """A feature, once for the stages behind it and once for the distiller, whose gradient is limited, see `Balance`."""

    @staticmethod
    def forward(ctx: Any, feature: Tensor, cap: float, ratio: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.cap, ctx.ratio, ctx.weight = cap, ratio, weight
        ctx.set_materialize_grads(False)
        return feature.view_as(feature), feature.view_as(feature)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, behind: Tensor | None, of_distiller: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        given = of_distiller if behind is None else behind
        # Of several processes, another one may have both gradients, and all have to take part in the sum.
        if (behind is None or of_distiller is None) and world_size() == 1:
            return given, None, None, None
        kind = torch.promote_types(given.dtype, torch.float32)
        zero = given.new_zeros((), dtype=kind)
        norms = torch.stack([zero if g is None else vector_norm(g, dtype=kind) for g in (behind, of_distiller)])
        (squares,) = all_sum(norms.square())
        h, g = squares.sqrt().unbind()
        ratio = torch.where(h > 0, g / h, 0.0)
        weight = torch.where(ratio > ctx.cap, ctx.cap / ratio, 1.0)
        ctx.ratio.copy_(ratio)
        ctx.weight.copy_(weight)
        if of_distiller is not None:
            given = weight * of_distiller if behind is None else behind + weight * of_distiller
        return given, None, None, None


def excessive_beta(means: Mapping[str, float], beta: float) -> list[str]:
    """A line for every spot whose weight is below `LOW_WEIGHT`, from the means of an epoch."""
    weights = {name.removeprefix("weight/"): mean for name, mean in means.items() if name.startswith("weight/")}
    return [
        f"kd.balance: β {beta:g} is {1 / weight:.0f} times too much at {spot} (its weight is {weight:.3f})"
        for spot, weight in weights.items()
        if 0 < weight < LOW_WEIGHT
    ]
