"""Contrastive representation distillation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import Distiller, Setting
from distillers.ops import at_least, linear_embedding, masked_mean
from distillers.registry import register_distiller
from utils.processes.group import all_sum, gather_rows

EPS = 1e-7
UNSET = -1.0
ANCHORS = 16  # samples whose similarities with the whole bank are worked out together
PRODUCTS = 2**25  # on a GPU more of them, 671 for 50,000 images: launches cost more there than memory


@at_least(torch.float32)
def crd_loss(positive: Tensor, negative: Tensor, normalizer: Tensor, gate: Tensor, *, samples: int) -> Tensor:
    """Noise-contrastive loss of telling the one positive from `K` negatives, in one direction.

    Tian, Krishnan, Isola: *Contrastive Representation Distillation*, ICLR 2020, arXiv 1910.10699.

    Args:
        positive: ``exp(similarity / temperature)`` of each sample and its own memory, ``[B]``.
        negative: the same with the memories of samples of other classes, ``[B, K]``.
        normalizer: Z, by which scores are divided to make them probabilities; a positive scalar.
        gate: ``[B]``, 1 where the sample is chosen.
        samples: number N of training samples; the noise distribution gives each ``1 / N``.
    """
    noise = negative.shape[1] / samples
    p_positive = positive / normalizer
    recognised = (p_positive / (p_positive + noise + EPS)).log()
    # log(noise / (p + noise + EPS)); p is thousands of times smaller than the noise, hence log1p.
    rejected = -((negative / normalizer + EPS) / noise).log1p().sum(dim=1)
    return masked_mean(-(recognised + rejected), gate)


def estimate_normalizer(positive: Tensor, negative: Tensor, gate: Tensor, samples: int) -> Tensor:
    """Z: `samples` times the mean score over all processes' chosen samples, a scalar; `UNSET` if none is chosen."""
    total, chosen = all_sum(gate @ (positive + negative.sum(dim=1)), gate.sum())
    mean = total / (chosen.clamp_min(1) * (1 + negative.shape[1]))
    return torch.where(chosen > 0, samples * mean, UNSET)


class NegativeSampler(nn.Module):
    """Draws training samples of other classes, uniformly and independently, on the device of its buffers.

    With all samples sorted by class, those of the other classes are what comes before and after one block.

    Args:
        labels: class of every training sample, ``[N]``.
    """

    # The buffers follow from the labels, so no checkpoint has them.
    order: Tensor  # samples sorted by class
    start: Tensor  # of each sample: where the block of its class starts in `order`
    size: Tensor  # of each sample: the length of that block

    def __init__(self, labels: Tensor):
        super().__init__()
        _, classes, counts = labels.unique(return_inverse=True, return_counts=True)
        starts = counts.cumsum(0) - counts
        self.register_buffer("order", classes.argsort(stable=True), persistent=False)
        self.register_buffer("start", starts[classes], persistent=False)
        self.register_buffer("size", counts[classes], persistent=False)
        self.fewest = len(labels) - int(counts.max())  # samples of other classes, for the largest class

    def forward(self, index: Tensor, amount: int) -> Tensor:
        """Draw ``[B, amount]`` samples for the samples `index`, ``[B]``; with replacement."""
        start, size = self.start[index, None], self.size[index, None]
        # float64, because float32 has too few values to be uniform over a million samples. In place, because these
        # are the largest tensors of a step.
        uniform = torch.rand(len(index), amount, device=index.device, dtype=torch.float64)
        position = uniform.mul_(len(self.order) - size).long()
        del uniform
        position.addcmul_(position >= start, size)
        return self.order[position]


class MemoryBank(nn.Module):
    """The latest embedding of every training sample by one network, and the normaliser Z of scores against them.

    Args:
        samples: number N of training samples.
        width: of the embeddings.
    """

    rows: Tensor
    normalizer: Tensor

    def __init__(self, samples: int, width: int):
        super().__init__()
        bound = math.sqrt(3 / width)  # rows have unit length on average
        self.register_buffer("rows", torch.empty(samples, width).uniform_(-bound, bound))
        self.register_buffer("normalizer", torch.tensor(UNSET))

    def scores(self, anchor: Tensor, candidates: Tensor, temperature: float) -> Tensor:
        """``exp(similarity / temperature)`` of each anchor, ``[B, D]``, and its candidates, ``[B, K + 1]``.

        Products with the whole bank and a gather of numbers: gathering the candidates' vectors, ``[B, K + 1, D]``,
        would take a hundred times the memory and twenty times the time. A few anchors at a time, because most of the
        products are not looked at: as fast, and ``[B, N]`` of them never exist at once.
        """
        size = max(ANCHORS, PRODUCTS // len(self.rows)) if anchor.is_cuda else ANCHORS
        blocks = zip(anchor.split(size), candidates.split(size))
        similarity = torch.cat([(block @ self.rows.T).gather(1, chosen) for block, chosen in blocks])
        return similarity.div(temperature).exp()

    def keep_normalizer(self, normalizer: Tensor) -> Tensor:
        """Z: the one kept, or else `normalizer`, which is kept from now on in training unless it is `UNSET`."""
        normalizer = torch.where(self.normalizer > 0, self.normalizer, normalizer)
        if self.training:
            self.normalizer.copy_(normalizer)
        return normalizer

    @torch.no_grad()
    def update(self, index: Tensor, embedding: Tensor, gate: Tensor, momentum: float) -> None:
        """Move the rows of the chosen samples towards their new embeddings, and back to unit length."""
        old = self.rows[index]
        new = F.normalize(momentum * old + (1 - momentum) * embedding, dim=1)
        self.rows.index_copy_(0, index, torch.where(gate[:, None] > 0, new, old))


class Contrast(nn.Module):
    """One spot: an embedding and a memory bank for each network.

    Args:
        student, teacher: shapes of the two features, batch dimension left out.
        samples: number of training samples.
        width: of the embeddings.
        temperature, momentum: see `CRD`.
    """

    def __init__(
        self,
        student: Sequence[int],
        teacher: Sequence[int],
        samples: int,
        width: int,
        temperature: float,
        momentum: float,
    ):
        super().__init__()
        self.temperature = temperature
        self.momentum = momentum
        self.embed_student = linear_embedding(student, width)
        self.embed_teacher = linear_embedding(teacher, width)
        self.student_bank = MemoryBank(samples, width)
        self.teacher_bank = MemoryBank(samples, width)

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, candidates: Tensor) -> Tensor:
        """Loss of both directions over the chosen samples, a scalar; in training, the banks move on.

        Args:
            student, teacher: the features.
            gate: ``[B]``.
            candidates: training samples, ``[B, K + 1]``; the first column is the batch itself, the rest are negatives.
        """
        return self.contrast(self.embed_student(student), self.embed_teacher(teacher), gate, candidates)

    @at_least(torch.float32)
    def contrast(self, student: Tensor, teacher: Tensor, gate: Tensor, candidates: Tensor) -> Tensor:
        """Loss of both directions from the embeddings, ``[B, D]``, whose length does not matter; see `forward`."""
        student, teacher = F.normalize(student, dim=1), F.normalize(teacher, dim=1)
        loss = self.loss_with_gradient(student, self.teacher_bank, gate, candidates)
        loss = loss + self.loss_with_gradient(teacher, self.student_bank, gate, candidates)
        if self.training:
            # With the samples of all processes, so that the banks stay the same on each.
            index, gate, student, teacher = gather_rows(candidates[:, 0], gate, student, teacher)
            self.student_bank.update(index, student, gate, self.momentum)
            self.teacher_bank.update(index, teacher, gate, self.momentum)
        return loss

    def loss_with_gradient(self, anchor: Tensor, bank: MemoryBank, gate: Tensor, candidates: Tensor) -> Tensor:
        """Loss of the unit vectors of one network, ``[B, D]``, against the memories of the other.

        Its gradient is computed here already; the backward pass hands it on.
        """
        # The banks change in place as soon as the scores are taken. An ordinary backward pass would still need them as
        # they were, hence a copy of a whole bank at every step; and it would keep the [B, N] scores.
        leaf = anchor.detach().requires_grad_()
        with torch.enable_grad():
            scores = bank.scores(leaf, candidates, self.temperature)
            positive, negative, samples = scores[:, 0], scores[:, 1:], len(bank.rows)
            with torch.no_grad():
                normalizer = bank.keep_normalizer(estimate_normalizer(positive, negative, gate, samples))
                # Unset means that no sample has been chosen yet, so the loss is 0 whatever stands here.
                normalizer = torch.where(normalizer > 0, normalizer, 1.0)
            loss = crd_loss(positive, negative, normalizer, gate, samples=samples)
        (gradient,) = torch.autograd.grad(loss, [leaf])
        # The sum is 0, and its derivative the gradient.
        return loss.detach() + ((anchor - anchor.detach()) * gradient).sum()


@register_distiller("crd")
class CRD(Distiller):
    """Contrast of the pooled vectors with those of samples of other classes.

    A step of training updates the banks at the chosen samples after the scores are taken: a checkpoint has the banks
    with which the next step begins. In evaluation mode nothing is updated.

    Args:
        negatives: number K drawn for each sample, at most as many as the largest class leaves.
        temperature: by which similarities are divided.
        momentum: share of the old memory in the new one.
    """

    default_weight = 0.8
    published_spots = ((-1, -1),)

    def __init__(
        self,
        setting: Setting,
        *,
        negatives: PositiveInt = 16384,
        temperature: PositiveFloat = 0.07,
        momentum: Annotated[float, Field(ge=0, lt=1)] = 0.5,
    ):
        super().__init__(setting)
        self.sampler = NegativeSampler(setting.labels)
        self.negatives = min(negatives, self.sampler.fewest)
        self.contrasts = nn.ModuleList(
            Contrast(
                setting.student[s], setting.teacher[t], len(setting.labels), setting.feat_dim, temperature, momentum
            )
            for s, t in self.spots
        )

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        candidates = torch.cat([batch.index[:, None], self.sampler(batch.index, self.negatives)], dim=1)
        return self.contrasts[k](student, teacher, gate, candidates)
