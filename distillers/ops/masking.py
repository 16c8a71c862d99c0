"""Losses over a chosen part of the batch, without ever gathering that part.

A gate is a float vector ``[B]`` of zeros and ones. Gathering the samples with gate 1 would make shapes
depend on data: a device sync at every gate, and no CUDA graphs. Masks give the same numbers.

Both means are those of the ``n`` chosen samples times the chosen share ``n / B``, and 0 if none is chosen.
"""

from __future__ import annotations

from torch import Tensor


def masked_mean(per_sample: Tensor, gate: Tensor) -> Tensor:
    """Mean of `per_sample` over the chosen samples, times ``n / B``; that is ``sum(gate * per_sample) / B``.

    Args:
        per_sample: one loss per sample, ``[B]``.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    return (gate * per_sample).sum() / gate.shape[0]


def masked_pair_mean(per_pair: Tensor, gate: Tensor) -> Tensor:
    """Mean of `per_pair` over the ``n * n`` ordered pairs of chosen samples, times ``n / B``.

    Args:
        per_pair: one loss per pair, ``[B, B]``, finite everywhere.
        gate: ``[B]``, 1 where the sample is chosen.
    """
    return gate @ per_pair @ gate / (chosen_count(gate) * gate.shape[0])


def chosen_count(gate: Tensor) -> Tensor:
    """Number ``n`` of chosen samples as a scalar to divide by: 1 if there is none."""
    return gate.sum().clamp_min(1)
