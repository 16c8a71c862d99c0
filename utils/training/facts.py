"""What is known of a run before its first step: how large its data and its networks are, and where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datasets import Data
from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.task import Task
from models.staged import copied
from utils.processes.group import world_size


def facts_of(task: Task, data: Data, device: torch.device) -> dict[str, Any]:
    """What goes into ``facts.json``, see `utils.run_folder.records.read_facts`. Nothing is computed on the device."""
    sizes = {
        "train_images": data.train.num_samples,
        "val_images": data.val.num_samples,
        "classes": data.source.num_classes,
        "image_size": list(data.source.image_size),
    }
    for prefix, model in (("", task.student), ("teacher_", getattr(task, "teacher", None))):
        if model is not None:
            sizes[f"{prefix}parameters"] = sum(p.numel() for p in model.parameters())
            sizes[f"{prefix}flops"] = flops_without_computing(model, data.source.image_size)
    return sizes | {"weights": weights_of(task), "device": name_of(device)}


def weights_of(task: Task) -> dict[str, tuple[float, int]]:
    """For each term of the loss that has a weight: the weight, and over how many epochs it grows to that."""
    if not isinstance(task, SpotAdaptiveDistillation):
        return {}
    spots = {f"loss/{spot}": (task.beta, task.beta_epochs) for spot in task.gate_labels[:-1]}
    return spots | {f"loss/{task.logit_loss.label}": (task.alpha, task.alpha_epochs)}


def name_of(device: torch.device) -> str:
    """The machine in words, e.g. ``"CPU, 2 threads"``."""
    threads = torch.get_num_threads()
    cpu = f"CPU, {threads} thread{'s' * (threads > 1)}"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    return f"{world_size()} processes, each on {name}" if world_size() > 1 else name


@torch.no_grad()
def flops(model: nn.Module, size: tuple[int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward pass: those of convolutions and matrix products."""
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, *size, device=device))
    return counter.get_total_flops()


def flops_without_computing(model: nn.Module, size: tuple[int, int]) -> int | None:
    """`flops` of a copy whose tensors hold no values; None for a network that needs the values."""
    # Parameters in float32, since those of a teacher may be in half precision, for which it takes autocast.
    stand_ins = {id(p): nn.Parameter(p.detach().to("meta").float(), requires_grad=False) for p in model.parameters()}
    stand_ins |= {id(b): b.to("meta") for b in model.buffers()}
    try:
        return flops(copied(model, stand_ins).eval(), size, torch.device("meta"))
    except Exception:  # a network of a user may raise anything, and its training does not need this figure
        return None
