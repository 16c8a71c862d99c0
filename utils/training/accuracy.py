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


@torch.inference_mode()
def evaluate(
    model: StagedModel,
    loader: Loader,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    before_batch: Callable[[], None] = lambda: None,
    after_batch: Callable[[Tensor, Tensor], None] = lambda logits, label: None,
) -> dict[str, float]:
    """``loss/total``, ``top1``, ``class_mean`` and perhaps ``top5`` of `model` over `loader`.

    Accuracies are in percent; ``class_mean`` is the mean of the classes' top-1 accuracies. The model's training mode is
    put back.

    Args:
        autocast: makes the context of the forward pass.
        before_batch: called before every batch.
        after_batch: called with the logits ``[B, num_classes]`` and labels ``[B]`` of every batch.
    """
    mode = model.training
    model.eval()
    meter = Meter(device)
    classes = torch.zeros(2, 0, dtype=torch.float64, device=device)  # hits and images of each
    with progress_bar("validation", len(loader)) as bar:
        for batch in loader.epoch(0):
            before_batch()
            with autocast():
                logits = model(batch.image).float()
            values = {"loss/total": F.cross_entropy(logits, batch.label)} | top_k_hits(logits, batch.label)
            meter.add(values, len(batch.label))
            classes = classes if classes.numel() else classes.new_zeros(2, logits.shape[1])
            is_hit = logits.argmax(dim=1) == batch.label
            classes.index_add_(1, batch.label, torch.stack([is_hit, torch.ones_like(is_hit)]).double())
            after_batch(logits, batch.label)
            bar.update()
    model.train(mode)
    hits, images = (counts.cpu() for counts in all_sum(*classes))  # a mask has as many entries as the device says
    means = meter.means()
    return means | {"class_mean": 100 * (hits / images)[images > 0].mean().item()}
