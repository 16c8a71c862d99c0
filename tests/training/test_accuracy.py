"""Accuracies are exact shares of whole images, by one rule for equal logits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from datasets.batch import Batch
from utils.training.accuracy import evaluate

CPU = torch.device("cpu")
LOGITS = (
    torch.randn(53, 8, generator=torch.Generator().manual_seed(0)).mul(3).round()
)  # many are equal; of the last class there is no image
LABELS = torch.arange(53) % 7


class Loader(list):
    def epoch(self, _):
        return iter(self)


def accuracies(logits: torch.Tensor, size: int) -> dict[str, float]:
    parts = zip(logits.split(size), LABELS.split(size), torch.arange(53).split(size))
    return evaluate(nn.Identity(), Loader(Batch(*part) for part in parts), CPU)


def test_of_equal_logits_the_first_one_counts_and_a_batch_size_changes_no_digit():
    order = LOGITS.argsort(dim=1, descending=True, stable=True)
    hits = [(order[:, :k] == LABELS[:, None]).any(dim=1) for k in (1, 5)]
    whole = accuracies(LOGITS, 53)
    assert [whole["top1"], whole["top5"]] == pytest.approx([100 * hit.sum().item() / 53 for hit in hits], rel=1e-15)
    of_classes = [100 * hits[0][label == LABELS].double().mean().item() for label in range(7)]
    assert whole["class_mean"] == pytest.approx(sum(of_classes) / 7)
    for size in (1, 7, 10):
        found = accuracies(LOGITS, size)
        assert all(found[name] == whole[name] for name in ("top1", "top5", "class_mean"))


@pytest.mark.parametrize("broken", [slice(None), slice(0, 20)])
def test_an_image_whose_logits_are_nan_is_no_hit(broken):
    logits = LOGITS.clone()
    logits[broken] = torch.nan
    hits = (LOGITS.argmax(dim=1) == LABELS).index_fill(0, torch.arange(53)[broken], False)
    assert accuracies(logits, 10)["top1"] == pytest.approx(100 * hits.sum().item() / 53)
