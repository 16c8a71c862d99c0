"""Accuracy on data that is not trained on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from datasets import Loader
from models.staged import StagedModel
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
    """``loss/total``, ``top1`` and perhaps ``top5`` (percent) of `model` over `loader`; puts its training mode back.

    Args:
        autocast: makes the context of the forward pass.
        before_batch: called before every batch.
        after_batch: called with the logits ``[B, num_classes]`` and labels ``[B]`` of every batch.
    """
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
            after_batch(logits, batch.label)
            bar.update()
    model.train(mode)
    return meter.means()
