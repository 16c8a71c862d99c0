"""Balanced spots: no spot pulls at the student more than ``kd.balance`` times as hard as the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.linalg import vector_norm

from models.staged import StagedModel
from utils.processes.group import all_sum

# Steps from one measurement to the next. On a CPU core, resnet20 to resnet8 at 16 x 16, a step that measures takes 1.5
# times as long as another one under AT, 1.25 under ReviewKD, 1.05 under SP and CRD. All steps together take at most
# 2.5 % longer.
MEASURE_EVERY = 20
MOMENTUM = 0.9  # share of the old ratio in the new one
UNSET = -1.0
LOW_WEIGHT = 0.1  # the log names spots whose weight ends below this


class Balance(nn.Module):
    """Weights ``w_k = min(1, cap / r_k)`` of the spots' losses, with ``r_k = β ‖∂ℓ_k/∂f_k‖ / ‖∂CE/∂f_k‖``.

    ``f_k`` is the student's feature of spot ``k``; the norms are those of the whole batch, of all processes. So β is an
    upper limit. A measurement costs a backward pass from the logits to the earliest spot, and the gradient of every
    spot's loss. One step in `MEASURE_EVERY` measures, and the ratios are smoothed.

    Args:
        cap: ``kd.balance``, how hard a spot may pull in comparison with the labels.
        spots: their number.

    Attributes:
        ratio: ``r_k`` of every spot, ``[K]``, at the full β; `UNSET` before a sample has been chosen there.
        measuring: whether the next step measures. Steps that do and steps that do not are captured apart.
    """

    ratio: Tensor

    def __init__(self, cap: float, spots: int):
        super().__init__()
        self.cap, self.measuring = cap, True
        self.register_buffer("ratio", torch.full((spots,), UNSET))

    def start_step(self, step: int) -> None:
        self.measuring = step % MEASURE_EVERY == 0

    def measure(
        self, ce: Tensor, losses: Tensor, features: Sequence[tuple[Tensor, Tensor]], chosen: Tensor, beta: float
    ) -> None:
        """Update `ratio`.

        Args:
            ce: cross-entropy of the student, a scalar.
            losses: of the spots, ``[K]``, without β.
            features: of the student at the spots: the one that leads to `ce`, and the one that leads to the loss.
            chosen: gates of the spots, ``[B, K]``. A spot without a chosen sample keeps its ratio.
            beta: the full β.
        """
        of_labels = squared_norms(ce, [feature for feature, _ in features])
        alone = zip(unstacked(losses), features)
        of_spots = torch.cat([squared_norms(loss, [feature]) for loss, (_, feature) in alone])
        labels, spots, count = all_sum(of_labels, of_spots, chosen.sum(dim=0).to(of_labels.dtype))
        new = beta * (spots / labels).sqrt()
        smooth = torch.where(self.ratio < 0, new, MOMENTUM * self.ratio + (1 - MOMENTUM) * new)
        self.ratio.copy_(torch.where((count > 0) & new.isfinite(), smooth, self.ratio))

    def forward(self, pull: Tensor) -> Tensor:
        """``w_k`` of every spot, ``[K]``; 1 where no ratio has been measured.

        Args:
            pull: ``r_k`` of every spot at the β of this epoch, ``[K]``.
        """
        return torch.where(pull > self.cap, self.cap / pull, 1.0)


def features_on_the_way(student: StagedModel, image: Tensor, count: int) -> tuple[list[Tensor], Tensor]:
    """The first `count` features and the logits, where each feature is the tensor that the next stage takes.

    `StagedModel.features` of a transformer gives maps that are made of its tokens. The logits are not computed from
    these maps, so the cross-entropy has no gradient there.
    """
    features = []
    for index in range(count):
        image = student.run(image, index, index + 1)
        features.append(image)
    return features, student.run(image, count)


def unstacked(losses: Tensor) -> list[Tensor | GradientEdge | None]:
    """What `losses`, ``[K]``, was stacked from, so that each can be differentiated alone; None: it has no gradient.

    The backward pass of one entry of a stack also goes through all others, with zeros: under ReviewKD, whose levels
    depend on each other, a measurement would take twice as long.
    """
    node = losses.grad_fn
    if node is None or node.name() != "StackBackward0":
        return list(losses.unbind())
    return [None if source is None else GradientEdge(source, number) for source, number in node.next_functions]


def squared_norms(loss: Tensor | GradientEdge | None, features: Sequence[Tensor]) -> Tensor:
    """Squared norm of the gradient of `loss` at each feature, in float32 or better; 0 where `loss` has none there."""
    wanted = [feature for feature in features if feature.requires_grad]  # a frozen stage has no gradient
    gradients: dict[int, Tensor | None] = {}
    if wanted and loss is not None and getattr(loss, "requires_grad", True):
        with torch.autocast(wanted[0].device.type, enabled=False):
            found = torch.autograd.grad([loss], wanted, retain_graph=True, allow_unused=True)
        gradients = dict(zip(map(id, wanted), found))
    none = torch.zeros((), dtype=torch.promote_types(features[0].dtype, torch.float32), device=features[0].device)
    of_features = [gradients.get(id(feature)) for feature in features]
    return torch.stack([none if g is None else vector_norm(g, dtype=none.dtype).square() for g in of_features])


def excessive_beta(means: Mapping[str, float], beta: float) -> list[str]:
    """A line for every spot whose weight is below `LOW_WEIGHT`, from the means of an epoch."""
    weights = {name.removeprefix("weight/"): mean for name, mean in means.items() if name.startswith("weight/")}
    return [
        f"kd.balance: β {beta:g} is {1 / weight:.0f} times too much at {spot} (its weight is {weight:.3f})"
        for spot, weight in weights.items()
        if 0 < weight < LOW_WEIGHT
    ]
