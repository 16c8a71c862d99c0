"""What the gates did: per class in every epoch, and per sample where asked for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from datasets.batch import Batch
from utils.distributed import all_max, all_sum, is_main, world_size
from utils.files import append_line, replacing

NOT_SEEN = 255  # by this process since it last told the first one


class GateRecorder:
    """Counts on the device how often each class is distilled at each spot; read once per epoch.

    Args:
        labels: name of every gate, the logits' last.
        num_classes: number of classes.
        num_samples: size of the training set.
        device: where the gates are.
    """

    def __init__(self, labels: list[str], num_classes: int, num_samples: int, device: torch.device):
        self.labels = labels
        self.chosen = torch.zeros(num_classes, len(labels), dtype=torch.float64, device=device)
        self.seen = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.samples = torch.zeros(num_samples, len(labels), dtype=torch.uint8, device=device)
        if not is_main():
            self.samples.fill_(NOT_SEEN)

    def add(self, gates: Tensor, batch: Batch) -> None:
        """Count one batch; `gates` is ``[B, K + 1]``, 1 where the sample was distilled."""
        self.chosen.index_add_(0, batch.label, gates.double())
        self.seen.index_add_(0, batch.label, torch.ones_like(batch.label, dtype=torch.float64))
        self.samples.index_copy_(0, batch.index, gates.to(torch.uint8))

    def collect(self) -> None:
        """Bring what all processes counted to the first one, which alone is read; do so at least once per epoch."""
        if world_size() == 1:
            return
        self.chosen, self.seen = all_sum(self.chosen, self.seen)
        # Within an epoch a sample is seen by one process: what another one saw is newer than what the first one kept.
        seen_here = (self.samples + 2).masked_fill(self.samples == NOT_SEEN, 0)
        newest = all_max(self.samples if is_main() else seen_here)
        self.samples = torch.where(newest >= 2, newest - 2, newest)
        if not is_main():
            self.reset()
            self.samples.fill_(NOT_SEEN)

    def shares(self) -> list[list[float | None]]:
        """Share of each class's samples distilled at each spot, ``[num_classes][K + 1]``; None for a class not seen.

        Waits for the device.
        """
        shares = (self.chosen / self.seen[:, None]).tolist()
        return [[round(x, 4) if x == x else None for x in row] for row in shares]

    def reset(self) -> None:
        """Start the next epoch; what is known of single samples stays until they are seen again."""
        self.chosen.zero_()
        self.seen.zero_()

    def write(self, file: Path, epoch: int) -> None:
        """Append this epoch's shares as one JSON line: ``global_epoch``, ``gates`` (names), ``classes``."""
        append_line(file, json.dumps({"global_epoch": epoch, "gates": self.labels, "classes": self.shares()}))

    def write_samples(self, file: Path) -> None:
        """Write the last gates of every sample as ``gates`` (uint8 ``[N, K + 1]``) and ``labels`` into an ``.npz``."""
        file.parent.mkdir(exist_ok=True)
        with replacing(file) as stream:
            np.savez_compressed(stream, gates=self.samples.cpu().numpy(), labels=np.array(self.labels))

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu() for name in ("chosen", "seen", "samples")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
