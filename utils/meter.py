"""Means over an epoch, kept on the device and read once in a while."""

from __future__ import annotations

import torch
from torch import Tensor


class Meter:
    """Sums of named scalars, weighted by the number of samples; reading them is the only host sync of an epoch.

    Args:
        device: where the sums live.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, values: dict[str, Tensor], samples: int) -> None:
        """Add means over `samples` samples. The names must be the same at every call."""
        row = torch.stack([value.double() for value in values.values()]) * samples
        if self.sums is None:
            self.names, self.sums = list(values), torch.zeros_like(row)
        self.sums += row
        self.count += samples

    def means(self) -> dict[str, float]:
        """Mean of every name so far; waits for the device."""
        if self.sums is None:
            return {}
        return dict(zip(self.names, (self.sums / self.count).tolist()))

    def state_dict(self) -> dict:
        return {"names": self.names, "sums": None if self.sums is None else self.sums.cpu(), "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.names, self.count = list(state["names"]), state["count"]
        self.sums = None if state["sums"] is None else state["sums"].to(self.device)


def top_k_hits(logits: Tensor, label: Tensor, ks: tuple[int, ...] = (1, 5)) -> dict[str, Tensor]:
    """Share of samples whose label is among the k largest logits, in percent, as scalars on the device.

    Args:
        logits: ``[B, num_classes]``.
        label: ``[B]``.
        ks: with fewer than k classes every sample counts as a hit.
    """
    best = logits.topk(min(max(ks), logits.shape[1]), dim=1).indices
    hits = best == label[:, None]
    return {f"top{k}": 100 * hits[:, :k].any(dim=1).float().mean() for k in ks}
