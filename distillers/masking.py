"""Losses over a chosen part of the batch, without ever gathering that part.

A gate is a float vector ``[B]`` of zeros and ones. Gathering the samples with gate 1 would make shapes
depend on data: a device sync at every gate, and no CUDA graphs. Masks give the same numbers.
"""

from __future__ import annotations

from torch import Tensor


def masked_mean(per_sample: Tensor, gate: Tensor) -> Tensor:
    """``n / B`` times the mean of `per_sample` over the ``n`` chosen samples, which is ``sum(gate * loss) / B``.

    Args:
        per_sample: one loss per sample, ``[B]``.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    return (gate * per_sample).sum() / gate.shape[0]


def pair_mask(gate: Tensor) -> Tensor:
    """``[B, B]``: 1 where both samples are chosen."""
    return gate[:, None] * gate[None, :]
