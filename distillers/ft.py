"""Factor transfer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, attention, masked_mean, pool_to_match
from distillers.registry import register_distiller
from models.staged import StagedModel


@at_least(torch.float32)
def ft_loss(student: Tensor, teacher: Tensor, gate: Tensor) -> Tensor:
    """Mean absolute difference of the normalised factors.

    Kim, Park, Kwak: *Paraphrasing Complex Network: Network Compression via Factor Transfer*, NeurIPS 2018,
    arXiv 1802.04977.

    Args:
        student, teacher: factors ``[B, C, H, W]``; sizes may differ.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    student, teacher = pool_to_match(student, teacher)
    return masked_mean((attention(student) - attention(teacher)).abs().mean(dim=1), gate)


@at_least(torch.float32)
def reconstruction_loss(reconstructed: Tensor, feature: Tensor) -> Tensor:
    """Mean squared error of an autoencoder, over everything."""
    return (reconstructed - feature).square().mean()


def convolutions(layer: type[nn.Module], widths: Sequence[int], norm: bool = False) -> nn.Sequential:
    """3x3 `layer` from each width to the next, each followed by BatchNorm (if `norm`) and LeakyReLU 0.1."""
    steps: list[nn.Module] = []
    for before, after in pairwise(widths):
        steps.append(layer(before, after, kernel_size=3, padding=1))
        if norm:
            steps.append(nn.BatchNorm2d(after))
        steps.append(nn.LeakyReLU(0.1))
    return nn.Sequential(*steps)


class Paraphraser(nn.Module):
    """Autoencoder of a teacher's map; what its encoder makes of `channels` is the factor, of width `factors`."""

    def __init__(self, channels: int, factors: int):
        super().__init__()
        self.encoder = convolutions(nn.Conv2d, (channels, channels, factors, factors))
        self.decoder = convolutions(nn.ConvTranspose2d, (factors, factors, channels, channels))

    def forward(self, feature: Tensor) -> Tensor:
        return self.decoder(self.encoder(feature))


@register_distiller("ft")
class FT(Distiller):
    """Factors of the second-last feature.

    A paraphraser learns to reconstruct the teacher's map, alone and beforehand. Then it is frozen, and a translator,
    trained with the student, must arrive at its factors from the student's map.

    Args:
        rate: width of the factors, as a share of the teacher's channels.
    """

    default_weight = 200.0
    published_spots = ((-2, -2),)
    maps_only = True

    def __init__(self, setting: Setting, *, rate: PositiveFloat = 0.5):
        super().__init__(setting)
        self.paraphrasers = nn.ModuleList()
        self.translators = nn.ModuleList()
        for spot in self.spots:
            c_student, c_teacher = setting.student[spot.student][0], setting.teacher[spot.teacher][0]
            factors = max(1, round(rate * c_teacher))
            self.paraphrasers.append(Paraphraser(c_teacher, factors))
            self.translators.append(convolutions(nn.Conv2d, (c_student, c_student, factors, factors), norm=True))

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        with torch.no_grad():
            factor = self.paraphrasers[k].encoder(teacher)
        # The translator sees the whole batch: its BatchNorm statistics must not depend on the gates.
        return ft_loss(self.translators[k](student), factor, gate)

    def main_parameters(self) -> Iterable[nn.Parameter]:
        return self.translators.parameters()

    def pretraining_parameters(self, student: StagedModel) -> list[nn.Parameter]:
        """The parameters of the paraphrasers."""
        return list(self.paraphrasers.parameters())

    def pretraining_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """Reconstruction error summed over the spots; the student's features are not looked at."""
        losses = []
        for spot, paraphraser in zip(self.spots, self.paraphrasers):
            feature = teacher[spot.teacher].detach()
            losses.append(reconstruction_loss(paraphraser(feature), feature))
        return torch.stack(losses).sum()
