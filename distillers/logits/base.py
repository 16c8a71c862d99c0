"""What a loss at the logits is."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from datasets.batch import Batch
from distillers.base import check_option


class LogitLoss(nn.Module):
    """Base class of what is matched at the logits. A subclass overrides `forward`. Modules that it assigns to itself
    are trained together with the student. Constants of the method are keyword arguments of its constructor, after the
    temperature, with the published values as defaults.

    Args:
        temperature: by which logits are divided before the softmax.

    Attributes:
        label: what it is called in logs, ``"loss/<label>"``.
        warmup_epochs: over how many epochs its weight α grows to its full value, if the config does not say.
        capturable: see `distillers.base.Distiller`.
    """

    label: ClassVar[str] = "logits"
    warmup_epochs: ClassVar[int] = 0
    capturable: ClassVar[bool] = True

    def __init__(self, temperature: float = 4.0):
        super().__init__()
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, gate: Tensor, batch: Batch) -> Tensor:
        """Loss over the chosen samples, times the chosen share ``n / B``; a scalar.

        Args:
            student, teacher: logits ``[B, num_classes]``; the teacher's are detached.
            gate: ``[B]``, 1 where the sample is chosen. With none chosen the loss is 0, never NaN.
            batch: has the labels.
        """
        raise NotImplementedError


def check_weight(name: str, value: object) -> None:
    """Check the weight of one part of a loss; `name` is ``"loss.option"``.

    Raises:
        UserError: it is not a number, or below 0.
    """
    check_option(name, value, lambda weight: weight >= 0, "a number from 0 on", key="kd_loss.logits_options")
