"""Training steps of a teacher/student pair, built as a run builds them."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from fractions import Fraction
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from datasets.batch import Batch
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from models import get_model
from utils.config import Config, find_config
from utils.training.build import assemble
from utils.training.cuda_graph import choose_recorder
from utils.training.device import set_up
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.precision import autocast, place_task
from utils.training.step import CapturedStep, EagerStep, Phase

log = logging.getLogger("sakd")

SEED = 1029


@dataclass(frozen=True)
class Conditions:
    """The conditions of a measurement.

    Attributes:
        device: of networks and data.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        batch_size: images per step.
        size: height and width of the images.
        num_classes: width of the logits.
        samples: training set, for which CRD keeps memory banks.
        rounds: measurements of each kind.
        cuda_graph, channels_last: as in the config.
    """

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 64
    size: int = 32
    num_classes: int = 100
    samples: int = 50_000
    rounds: int = 2
    cuda_graph: str = "auto"
    channels_last: str = "auto"

    def labels(self) -> Tensor:
        """Class of every training sample, int64 ``[N]``."""
        return torch.arange(self.samples) % self.num_classes

    def batch(self) -> Batch:
        """A batch of noise: the content of an image does not change the time of a step."""
        generator = torch.Generator().manual_seed(SEED)
        index = torch.randint(self.samples, (self.batch_size,), generator=generator)
        image = torch.randn(self.batch_size, 3, self.size, self.size, generator=generator)
        return Batch(*(item.to(self.device) for item in (image, self.labels()[index], index)))


class Pair(NamedTuple):
    """Teacher and student by name."""

    teacher: str
    student: str

    def __str__(self) -> str:
        return f"{self.teacher}-{self.student}"


@dataclass(frozen=True)
class Kind:
    """A distiller and where it distils.

    Attributes:
        distiller: its name.
        selection: ``fixed`` or ``adaptive``.
        share: ``kd.routing_share``.
    """

    distiller: str
    selection: str
    share: Fraction = Fraction(1)

    def __str__(self) -> str:
        return f"{self.distiller} {self.selection}" + ("" if self.share == 1 else f" {self.share}")


PLAIN_KD = Kind("kd", "fixed")


class Case:
    """Training steps of one kind, taken as a run takes them.

    Args:
        pair: the networks, untrained.
        kind: the distiller and where it distils.
        conditions: of the measurement.

    Raises:
        UserError: the distiller refuses the pair.
    """

    def __init__(self, pair: Pair, kind: Kind, conditions: Conditions):
        config, device = _config(pair, kind, conditions), conditions.device
        set_up(config)
        student, teacher = (get_model(name, conditions.num_classes) for name in (pair.student, pair.teacher))
        image_size, labels = (conditions.size, conditions.size), conditions.labels()
        data = SimpleNamespace(labels=labels, image_size=image_size)
        self.task: SpotAdaptiveDistillation = assemble(config, student, teacher, data)
        place_task(self.task, config, device, image_size).train()
        self.optimizers = make_optimizers(self.task.parameter_groups(), config)
        self.batch = conditions.batch()
        phase = Phase("train", self.task, 1, self.optimizers)
        gates = GateRecorder(list(self.task.gate_labels), conditions.num_classes, conditions.samples, device)
        self.eager = EagerStep(phase, Meter(device), gates, autocast(device, conditions.precision))
        recorder = choose_recorder(config.training.cuda_graph, device, self.task, log.info)
        self._step = (
            self.eager if recorder is None else CapturedStep(self.eager, recorder, lambda size, why: log.info(why))
        )

    @property
    def captured(self) -> bool:
        """Its steps are replayed as one CUDA graph."""
        return self._step.captured

    def step(self) -> None:
        """One training step."""
        self._step(self.batch)


def _config(pair: Pair, kind: Kind, conditions: Conditions) -> Config:
    composed = find_config("cifar-100", SEED, teacher=pair.teacher, student=pair.student, distiller=kind.distiller)
    return composed.load(
        [
            f"kd.selection={kind.selection}",
            f"kd.routing_share={float(kind.share)}",
            f"training.precision={conditions.precision}",
            f"training.batch_size={conditions.batch_size}",
            f"training.cuda_graph={conditions.cuda_graph}",
            f"training.channels_last={conditions.channels_last}",
            f"dataset.num_classes={conditions.num_classes}",
        ]
    )
