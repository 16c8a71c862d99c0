"""Cross-entropy with the labels of a batch: as they are, smoothed, or mixed together with the images."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Dirichlet

from datasets.batch import Batch
from distillers.ops import at_least


class Targets(NamedTuple):
    """What a network should say of a batch. A mixed image is of two classes.

    Attributes:
        label: class of each image, int64 ``[B]``.
        other: class of what was mixed into it, int64 ``[B]``; None where nothing was.
        share: of `label` in the target, a scalar in [0, 1]; the rest is that of `other`.
    """

    label: Tensor
    other: Tensor | None = None
    share: Tensor | None = None

    def first(self, count: int) -> Targets:
        """The targets of the first `count` images."""
        return self._replace(label=self.label[:count], other=None if self.other is None else self.other[:count])

    @property
    def dominant(self) -> Tensor:
        """The class with the larger share, ``[B]``."""
        return self.label if self.other is None else torch.where(self.share >= 0.5, self.label, self.other)


class LabelLoss(nn.Module):
    """Cross-entropy with the labels, and the mixing that comes before it. No step waits for the device.

    Each image is mixed with the one before it in the batch, which is in random order already, and the same for the
    whole batch: in mixup all pixels have the share λ ~ Beta(α, α) of the image itself, in CutMix a rectangle of the
    part 1 - λ is the other image's. Where both are on, each step is one or the other with probability 1/2.

    Zhang et al., "mixup: Beyond Empirical Risk Minimization", ICLR 2018, arXiv 1710.09412.
    Yun et al., "CutMix: Regularization Strategy to Train Strong Classifiers", ICCV 2019, arXiv 1905.04899.
    Szegedy et al., "Rethinking the Inception Architecture", CVPR 2016, arXiv 1512.00567 (label smoothing).

    Args:
        smoothing: part of the target that is spread evenly over all classes.
        mixup, cutmix: the α of each; 0: never.
        class_weights: of the images of each class in the mean over a batch, float32 ``[num_classes]``; None: all alike.
    """

    def __init__(
        self,
        smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        class_weights: Tensor | None = None,
    ):
        super().__init__()
        self.smoothing = smoothing
        self.register_buffer("_class_weights", class_weights, persistent=False)
        # On the device, because a step that is captured as a CUDA graph cannot bring a number there.
        for name, alpha in (("_mixup", mixup), ("_cutmix", cutmix)):
            self.register_buffer(name, torch.full((2,), alpha) if alpha else None, persistent=False)

    def mix(self, batch: Batch) -> tuple[Batch, Targets]:
        """`batch` with its images mixed, in training and if asked for, and the targets for `forward`.

        The label and the index of the batch stay those of the image itself.
        """
        if not self.training or (self._mixup is None and self._cutmix is None):
            return batch, Targets(batch.label)
        own = self._own_share(batch.image)
        image = torch.lerp(batch.image.roll(1, 0), batch.image, own)
        return batch._replace(image=image), Targets(batch.label, batch.label.roll(1, 0), own.mean())

    def forward(self, logits: Tensor, targets: Targets) -> Tensor:
        """Mean over the batch, a scalar, of `logits` ``[B, num_classes]``."""
        how = self.smoothing, self._class_weights
        loss = _cross_entropy(logits, targets.label, *how)
        if targets.other is None:
            return loss
        # Without class weights the same as with probabilities as targets, which need not be made.
        return torch.lerp(_cross_entropy(logits, targets.other, *how), loss, targets.share)

    def _own_share(self, image: Tensor) -> Tensor:
        """What part of each pixel is the image's own, in a shape that broadcasts to ``[B, C, H, W]``."""
        if self._cutmix is None:
            return _beta(self._mixup).view(1, 1, 1, 1)
        outside = _outside_of_rectangle(1 - _beta(self._cutmix), *image.shape[-2:]).view(1, 1, *image.shape[-2:])
        if self._mixup is None:
            return outside
        return torch.where(torch.rand((), device=image.device) < 0.5, _beta(self._mixup), outside)


@at_least(torch.float32)
def _cross_entropy(logits: Tensor, label: Tensor, smoothing: float, class_weights: Tensor | None) -> Tensor:
    return F.cross_entropy(logits, label, class_weights, label_smoothing=smoothing)


def _beta(alphas: Tensor) -> Tensor:
    return Dirichlet(alphas, validate_args=False).sample()[0]


def _outside_of_rectangle(part: Tensor, height: int, width: int) -> Tensor:
    """``[H, W]``: 0 in a rectangle of `part` of the area at a random place, which the image may cut off; else 1."""
    center = torch.rand(2, device=part.device)
    half = part.sqrt() / 2  # of the side, in sides of the image
    rows, columns = ((torch.arange(n, device=part.device) + 0.5) / n for n in (height, width))
    inside = ((rows - center[0]).abs() < half)[:, None] & ((columns - center[1]).abs() < half)
    return 1 - inside.float()
