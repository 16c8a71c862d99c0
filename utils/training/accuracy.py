"""Accuracy on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Loader
from models.staged import StagedModel
from utils.processes.group import all_sum
from utils.training.meter import Meter, top_k_hits
from utils.training.reporter import progress_bar

NO_AUTOCAST = nullcontext()


@torch.inference_mode()
def evaluate(
    model: StagedModel,
    loader: Loader,
    device: torch.device,
    autocast: AbstractContextManager = NO_AUTOCAST,
    before_batch: Callable[[], None] = lambda: None,
    after_batch: Callable[[Tensor, Tensor], None] = lambda logits, label: None,
) -> dict[str, float]:
    """``loss/total``, ``top1``, ``class_mean`` and perhaps ``top5`` of `model` over `loader`.

    Accuracies are in percent; ``class_mean`` is the mean of the classes' top-1 accuracies. The model's training mode is
    put back.

    Args:
        autocast: the context of the forward pass.
        before_batch: called before every batch.
        after_batch: called with the logits ``[B, num_classes]`` and labels ``[B]`` of every batch.
    """
    mode = model.training
    model.eval()
    meter = Meter(device)
    counts: dict[str, Tensor] = {}  # of each class: images and hits, whole numbers, which no order of batches rounds
    with progress_bar("validation", len(loader)) as bar:
        for batch in loader.epoch(0):
            before_batch()
            with autocast:
                logits = model(batch.image).float()
            meter.add({"loss/total": F.cross_entropy(logits, batch.label)}, len(batch.label))
            found = {"images": torch.ones_like(batch.label)} | top_k_hits(logits, batch.label)
            for name, values in found.items():
                row = counts.setdefault(name, torch.zeros(logits.shape[1], dtype=torch.int64, device=device))
                row.index_add_(0, batch.label, values.long())
            after_batch(logits, batch.label)
            bar.update()
    model.train(mode)
    images, *hits = (row.cpu().double() for row in all_sum(*counts.values()))
    means = {name: (100 * row.sum() / images.sum().clamp(min=1)).item() for name, row in zip(list(counts)[1:], hits)}
    class_mean = 100 * (hits[0] / images)[images > 0].mean().item()
    return meter.means() | means | {"class_mean": class_mean}
