"""Accuracy on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from datasets import Loader
from models.staged import StagedModel
from utils.training.meter import Meter, top_k_hits
from utils.training.reporter import progress_bar


@torch.inference_mode()
def evaluate(
    model: StagedModel, loader: Loader, device: torch.device, autocast: Callable, before_batch: Callable = lambda: None
) -> dict[str, float]:
    """``loss/total``, ``top1`` and ``top5`` (percent) of `model` over `loader`; puts its training mode back."""
    mode = model.training
    model.eval()
    meter = Meter(device)
    with progress_bar("validation", len(loader)) as bar:
        for batch in loader.epoch(0):
            before_batch()
            with autocast():
                logits = model(batch.image).float()
            values = {"loss/total": F.cross_entropy(logits, batch.label)} | top_k_hits(logits, batch.label)
            meter.add(values, len(batch.label))
            bar.update()
    model.train(mode)
    return meter.means()
