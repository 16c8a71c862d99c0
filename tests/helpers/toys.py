"""Small stand-ins with which the whole machinery runs in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from datasets import Data
from datasets.batch import Batch
from datasets.loading.augment import Augment
from datasets.loading.loader import MemoryLoader
from datasets.loading.order import Order
from datasets.loading.stream import StreamLoader
from datasets.source import Arrays, Source
from distillers import DISTILLERS
from distillers.base import Distiller, Setting
from distillers.registry import POLICIES
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.spot_adaptive.policy import PolicySetting
from distillers.spot_adaptive.selection import SELECTIONS
from distillers.task import Task, TaskOutput
from models.staged import StagedModel, global_pool

CPU = torch.device("cpu")
NUM_CLASSES = 5
IMAGE_SIZE = (8, 8)
NUM_SAMPLES = 40


class ToyNet(StagedModel):
    """Three maps and a pooled vector, with BatchNorm everywhere: (w, 8, 8), (w, 8, 8), (2w, 4, 4), (2w,)."""

    def __init__(self, width: int = 4, num_classes: int = NUM_CLASSES):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 2 * width, 3, 2, padding=1, bias=False), nn.BatchNorm2d(2 * width)
        self.fc = nn.Linear(2 * width, num_classes)

    def stages(self):
        return (
            (self.conv1, self.bn1, F.relu),
            (self.conv2, self.bn2, F.relu),
            (self.conv3, self.bn3, F.relu),
            (global_pool,),
            (self.fc,),
        )


def toy_labels() -> torch.Tensor:
    return torch.arange(NUM_SAMPLES) % NUM_CLASSES


def toy_batch(size: int = 6, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(NUM_SAMPLES, generator=generator)[:size]
    return Batch(torch.randn(size, 3, *IMAGE_SIZE, generator=generator), toy_labels()[index], index)


@cache
def toy_shapes(kind: type[StagedModel]) -> list[tuple[int, ...]]:
    with torch.random.fork_rng(devices=[]):
        return kind().feature_shapes(*IMAGE_SIZE)


def toy_setting(student: StagedModel, teacher: StagedModel, **changes) -> Setting:
    shapes = {"student": toy_shapes(type(student)), "teacher": toy_shapes(type(teacher))}
    return Setting(**shapes, labels=toy_labels(), feat_dim=8, pair="toy-toy", **changes)


def toy_task(
    distiller: str | type[Distiller] = "at", seed: int = 0, spots=None, teacher=ToyNet, policy="gumbel", **options
) -> SpotAdaptiveDistillation:
    """A task of two toys of one width, so that every distiller applies; the same `seed` gives the same weights."""
    torch.manual_seed(seed)
    student, teacher = ToyNet(), teacher()
    for _ in range(3):  # running statistics unlike those that a fresh network has
        for net in (student, teacher):
            net.train()(torch.randn(16, 3, *IMAGE_SIZE) * 1.5 + 0.3)
    setting = toy_setting(student, teacher, spots=spots)
    distill = (DISTILLERS.get(distiller) if isinstance(distiller, str) else distiller)(setting)
    if SELECTIONS[options.get("selection", "adaptive")].policy:
        kind = POLICIES.get(policy) if isinstance(policy, str) else policy
        options["policy"] = kind(PolicySetting(setting.student, setting.teacher, distill.spots))
    return SpotAdaptiveDistillation(student, teacher, distill, setting.student, setting.teacher, **options).train()


def take_step(task: Task, batch: Batch) -> TaskOutput:
    """Forward and backward passes of one step; what the task yielded, as one, the losses added up."""
    loss, parts, logits, gates, label = torch.zeros(()), {}, None, None, None
    for output in task(batch):
        output.loss.backward()
        loss = loss + output.loss.detach()
        parts |= output.parts
        logits = output.logits if logits is None else logits
        gates = output.gates if gates is None else gates
        label = output.label if label is None else label
    return TaskOutput(loss, parts, logits, gates, label)


def toy_data(
    batch_size: int = 8, shard: tuple[int, int] = (0, 1), device: torch.device = CPU, workers: int | None = None
) -> Data:
    """Forty coloured-noise images whose class shifts the mean: learnable, and five batches of eight.

    With a number of `workers`, 0 included, the training images are streamed, else they lie on the `device`.
    """
    labels = toy_labels()
    generator = torch.Generator().manual_seed(7)
    noise = torch.randint(0, 80, (NUM_SAMPLES, 3, *IMAGE_SIZE), generator=generator)
    images = (noise + 35 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    common = {"seed": 1029, "device": device}

    def how(augment: str, *, shuffle: bool) -> tuple[Order, Augment]:
        transform = Augment(augment, IMAGE_SIZE, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), device)
        return Order(NUM_SAMPLES, batch_size, shuffle=shuffle, shard=shard), transform

    if workers is None:
        train = MemoryLoader(images, labels, *how("crop_flip", shuffle=True), **common)
    else:
        split = Arrays(images, labels)
        train = StreamLoader(split, *how("crop_flip", shuffle=True), margin=False, workers=workers, **common)
    val = MemoryLoader(images, labels, *how("none", shuffle=False), **common)
    names = tuple(f"class {k}" for k in range(NUM_CLASSES))
    return Data(toy_source(labels, names), train, val)


def toy_source(labels: torch.Tensor, class_names: Sequence[str], size: tuple[int, int] = IMAGE_SIZE) -> Source:
    """Black images, the same to train on and to validate."""
    split = Arrays(torch.zeros(len(labels), 3, *size, dtype=torch.uint8), labels)
    return Source(split, split, tuple(class_names), (0.5,) * 3, (0.25,) * 3, "crop_flip", size)
