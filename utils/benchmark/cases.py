"""What is measured: training steps of one teacher/student pair, put together as a run would."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from datasets.batch import Batch
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from models import MODELS, StagedModel, get_model
from utils.config import Config, find_config
from utils.errors import UserError
from utils.training.build import assemble
from utils.training.cuda_graph import choose_recorder
from utils.training.device import autocast, place_task
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.step import CapturedStep, EagerStep, Phase

log = logging.getLogger("sakd")

SEED = 1029


@dataclass(frozen=True)
class Conditions:
    """Under which everything is measured.

    Attributes:
        device: where.
        precision: ``fp32``, ``tf32`` or ``bf16``.
        batch_size: images per step.
        size: height and width of the images.
        num_classes: width of the logits.
        samples: training set, for which CRD keeps memory banks.
    """

    device: torch.device
    precision: str = "fp32"
    batch_size: int = 64
    size: int = 32
    num_classes: int = 100
    samples: int = 50_000

    def labels(self) -> Tensor:
        """Class of every training sample, int64 ``[N]``."""
        return torch.arange(self.samples) % self.num_classes

    def batch(self) -> Batch:
        """A batch of noise: what an image shows does not change the time of a step."""
        generator = torch.Generator().manual_seed(SEED)
        index = torch.randperm(self.samples, generator=generator)[: self.batch_size]
        image = torch.randn(self.batch_size, 3, self.size, self.size, generator=generator)
        return Batch(*(item.to(self.device) for item in (image, self.labels()[index], index)))


@dataclass(frozen=True)
class Pair:
    """Teacher and student by name."""

    teacher: str
    student: str

    @classmethod
    def parse(cls, text: str) -> Pair:
        """From ``"vgg13-vgg8"``; names may have dashes of their own.

        Raises:
            UserError: there are no such networks.
        """
        words = text.split("-")
        for k in range(1, len(words)):
            teacher, student = "-".join(words[:k]), "-".join(words[k:])
            if teacher in MODELS and student in MODELS:
                return cls(teacher, student)
        raise UserError(f"{text}: no such pair; expected <teacher>-<student>, e.g. vgg13-vgg8, names of models/")

    def __str__(self) -> str:
        return f"{self.teacher}-{self.student}"


class Case:
    """Training steps of one distiller under one selection, with the published weights.

    Args:
        pair: the networks.
        distiller, selection: what to distil, and where.
        teacher: of the pair; one serves all its cases.
        conditions: of the measurement.
        overrides: config keys, as on a command line.

    Raises:
        UserError: the distiller refuses the pair.
    """

    def __init__(
        self,
        pair: Pair,
        distiller: str,
        selection: str,
        teacher: StagedModel,
        conditions: Conditions,
        overrides: tuple[str, ...] = (),
    ):
        self.distiller, self.selection = distiller, selection
        self.config = _config(pair, distiller, selection, conditions, overrides)
        torch.manual_seed(SEED)
        student = get_model(pair.student, conditions.num_classes)
        data = SimpleNamespace(
            train=SimpleNamespace(labels=conditions.labels()), image_size=(conditions.size, conditions.size)
        )
        self.task: SpotAdaptiveDistillation = assemble(self.config, student, teacher, data)
        place_task(self.task, self.config, conditions.device, data.image_size).train()
        self.optimizers = make_optimizers(self.task.parameter_groups(), self.config)
        self.batch = conditions.batch()
        phase = Phase("train", self.task, 1, self.optimizers)
        gates = GateRecorder(list(self.task.gate_labels), conditions.num_classes, conditions.samples, conditions.device)
        context = partial(autocast, conditions.device, conditions.precision)
        self.eager = EagerStep(phase, Meter(conditions.device), gates, context)
        recorder = choose_recorder(self.config.training.cuda_graph, conditions.device, [self.task], log.info)
        self._step = self.eager if recorder is None else CapturedStep(self.eager, recorder, log.info)

    def step(self) -> None:
        """One training step, as the engine takes it."""
        self._step(self.batch)


def make_teacher(pair: Pair, conditions: Conditions) -> StagedModel:
    """The pair's teacher, untrained."""
    torch.manual_seed(SEED)
    return get_model(pair.teacher, conditions.num_classes).to(conditions.device)


def _config(pair: Pair, distiller: str, selection: str, conditions: Conditions, more: tuple[str, ...]) -> Config:
    composed = find_config("cifar-100", SEED, teacher=pair.teacher, student=pair.student, distiller=distiller)
    return composed.load(
        [
            f"kd.selection={selection}",
            f"training.precision={conditions.precision}",
            f"training.batch_size={conditions.batch_size}",
            f"dataset.num_classes={conditions.num_classes}",
            *more,
        ]
    )
