"""Training steps on tensors without values: what looks at one, or at a tensor of another device, is an error.

A stand-in for a GPU, where the first would wait for the device and the second would fail.
"""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from toys import NUM_CLASSES, NUM_SAMPLES, toy_batch, toy_task

from datasets.batch import Batch
from distillers import DISTILLERS
from distillers.at import AT
from distillers.spot_adaptive.selection import SELECTIONS
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import ScheduledOptimizer
from utils.training.step import EagerStep, Phase

NOWHERE = torch.device("meta")


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """It does not know this device."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **options: nullcontext())


def take_two_steps(distiller, selection):
    task = toy_task(distiller, selection=selection).to(NOWHERE)
    optimizers = {
        name: ScheduledOptimizer(torch.optim.SGD(group, lr=0.1, momentum=0.9), 0.1)
        for name, group in task.parameter_groups().items()
    }
    gates = GateRecorder(list(task.gate_labels), NUM_CLASSES, NUM_SAMPLES, NOWHERE)
    step = EagerStep(Phase("train", task, 1, optimizers), Meter(NOWHERE), gates, nullcontext)
    for _ in range(2):
        step(Batch(*(value.to(NOWHERE) for value in toy_batch())))


@pytest.mark.parametrize(
    ("distiller", "selection"),
    [*((name, "adaptive") for name in sorted(set(DISTILLERS))), *(("at", name) for name in sorted(set(SELECTIONS)))],
)
def test_a_step_stays_on_its_device_and_looks_at_no_value(distiller, selection):
    take_two_steps(distiller, selection)


class MixesDevices(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student * torch.ones(student.shape[1:]), teacher, gate, batch)


class LooksAtAValue(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        loss = super().spot_loss(k, student, teacher, gate, batch)
        return loss if loss < 1 else loss.sqrt()


@pytest.mark.parametrize("distiller", [MixesDevices, LooksAtAValue])
def test_what_does_not_would_be_noticed(distiller):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        take_two_steps(distiller, "adaptive")
