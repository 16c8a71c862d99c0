"""Images per second of the in-memory loader, and of torchvision's transforms, which take one image at a time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from datasets.loading.augment import Augment
from datasets.loading.memory import MemoryLoader
from datasets.loading.order import Order
from utils.benchmark.cases import SEED, Conditions

MEAN, STD = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)


def memory_loader(conditions: Conditions) -> MemoryLoader:
    """The product's loader of noise images under crop and flip, as many as a training set has."""
    shape = (conditions.samples, 3, conditions.size, conditions.size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    order = Order(len(images), conditions.batch_size, shuffle=True)
    augment = Augment("crop_flip", images.shape[-2:], MEAN, STD, conditions.device)
    return MemoryLoader(images, conditions.labels(), order, augment, seed=SEED, device=conditions.device)


def endless(loader: MemoryLoader) -> Iterator[Any]:
    """Batches of one epoch after another."""
    for epoch in itertools.count():
        yield from loader.epoch(epoch)


def per_image(conditions: Conditions) -> Callable[[], Tensor]:
    """A function that makes one batch with torchvision's transforms of PIL images, in this process."""
    shape = (conditions.batch_size, 3, conditions.size, conditions.size)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(SEED))
    pictures = [functional.to_pil_image(image) for image in images]
    pipeline = transforms.Compose(
        [
            transforms.RandomCrop(conditions.size, padding=conditions.size // 8),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    return lambda: torch.stack([pipeline(picture) for picture in pictures])
