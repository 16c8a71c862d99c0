"""Inputs for distillers, and the names of those that there are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from datasets.batch import Batch
from distillers import DISTILLERS, registry
from distillers.base import Setting

BATCH = 6
NUM_SAMPLES = 40
STUDENT = [(6, 16, 16), (6, 16, 16), (8, 8, 8), (12, 4, 4), (12,)]
WIDER = [(6, 16, 16), (10, 16, 16), (16, 8, 8), (20, 4, 4), (20,)]
LARGER_MAPS = [(6, 32, 32), (6, 32, 32), (8, 16, 16), (12, 8, 8), (12,)]
ODD_MAPS = [(6, 14, 14), (6, 14, 14), (8, 7, 7), (12, 3, 3), (12,)]
DEEPER = [(6, 16, 16), (6, 16, 16), (8, 8, 8), (12, 4, 4), (12, 2, 2), (20,)]

WITH_SPOTS = ["at", "fitnet", "sp", "rkd", "cc", "vid", "pkt", "ft", "fsp", "nst", "crd", "reviewkd"]
LOGITS_ONLY = ["kd", "dkd", "dist", "nkd", "wttm"]
MAPS_ONLY = ["at", "vid", "ft", "fsp", "nst"]
ADDED = [name for name in DISTILLERS if name not in LOGITS_ONLY + WITH_SPOTS]  # by a user
SPOTTED = WITH_SPOTS + [name for name in ADDED if not DISTILLERS.get(name).logits_only]
NAMES = LOGITS_ONLY + WITH_SPOTS + ADDED
every_distiller = pytest.mark.parametrize("name", NAMES)
every_spotted = pytest.mark.parametrize("name", SPOTTED)
GATES = {
    "all": torch.ones(BATCH),
    "some": torch.tensor([1.0, 0, 1, 1, 0, 0]),
    "one": torch.tensor([0.0, 0, 0, 1, 0, 0]),
    "none": torch.zeros(BATCH),
}


def setting(name: str = "at", student=STUDENT, teacher=None, **changes) -> Setting:
    """By default of two networks that differ in width, or, for FSP, that do not."""
    teacher = teacher or (student if name == "fsp" else WIDER)
    changes = {"labels": torch.arange(NUM_SAMPLES) % 4, "feat_dim": 8, "pair": "big-small"} | changes
    return Setting(student, teacher, **changes)


def build(name: str, *args, seed: int = 0, options=None, **changes):
    torch.manual_seed(seed)
    return registry.build(DISTILLERS, name, "kd_loss.options", options, setting(name, *args, **changes))


def random_features(shapes, seed: int = 0, size: int = BATCH) -> list[torch.Tensor]:
    """Not negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, *shape, generator=generator) for shape in shapes]


def make_inputs(name: str, student=STUDENT, teacher=None, *, gate=GATES["all"], spots=None):
    """Arguments of a distiller's forward; the student's features want gradients, every spot has the same gate."""
    chosen = setting(name, student, teacher)
    features = [x.requires_grad_() for x in random_features(chosen.student, seed=1)]
    index = torch.arange(BATCH) * 3
    batch = Batch(torch.zeros(BATCH, 3, 1, 1), chosen.labels[index], index)
    gates = gate[:, None].expand(-1, len(build(name, student, teacher, spots=spots).spots))
    return features, random_features(chosen.teacher, seed=2), gates, batch


def gradients(module: nn.Module, features) -> list[torch.Tensor]:
    return [x.grad for x in (*features, *module.parameters()) if x.grad is not None]


class Largest(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor that an operation within gives, as `size`."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.size = max(self.size, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)), 0)
        return result
