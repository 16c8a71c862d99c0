"""What the gates did: per class in every epoch, and per sample since the beginning."""

from __future__ import annotations

import json

import numpy as np
import torch
from torch import Tensor

from datasets.batch import Batch
from utils.files import append_line, replacing
from utils.processes.group import all_sum, is_main
from utils.run_folder.layout import Layout


class GateRecorder:
    """Counts on the device how often each class and each sample is distilled at each spot; read once per epoch.

    On a single process the tensors stay the same ones for good: a CUDA graph may write to them.

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
        self.sample_chosen = torch.zeros(num_samples, len(labels), dtype=torch.int32, device=device)
        self.sample_seen = torch.zeros(num_samples, dtype=torch.int32, device=device)

    def add(self, gates: Tensor, batch: Batch) -> None:
        """Count one batch; `gates` is ``[B, K + 1]``, 1 where the sample was distilled."""
        self.chosen.index_add_(0, batch.label, gates.double())
        self.seen.index_add_(0, batch.label, torch.ones_like(batch.label, dtype=torch.float64))
        self.sample_chosen.index_add_(0, batch.index, gates.to(torch.int32))
        self.sample_seen.index_add_(0, batch.index, torch.ones_like(batch.index, dtype=torch.int32))

    def collect(self) -> None:
        """Bring what all processes counted to the first one, which alone is read; do so at least once per epoch."""
        self.chosen, self.seen = all_sum(self.chosen, self.seen)
        self.sample_chosen, self.sample_seen = all_sum(self.sample_chosen, self.sample_seen)
        if not is_main():  # or what it has told would be counted again
            self.reset()
            self.sample_chosen.zero_()
            self.sample_seen.zero_()

    def shares(self) -> list[list[float | None]]:
        """Share of each class's samples distilled at each spot, ``[num_classes][K + 1]``; None for a class not seen.

        Waits for the device.
        """
        shares = (self.chosen / self.seen[:, None]).tolist()
        return [[round(x, 4) if x == x else None for x in row] for row in shares]

    def end_epoch(self, run: Layout, epoch: int, *, samples: bool) -> None:
        """Write what was counted, and start the next epoch of the classes.

        A line of ``gates.jsonl`` has ``global_epoch``, ``gates`` (their names) and the shares of the ``classes``. The
        file of the samples has int32 ``distilled`` ``[N, K + 1]`` and ``seen`` ``[N]``, in epochs, and ``labels``.

        Args:
            run: the folder.
            epoch: number of the epoch, phases counted together.
            samples: write the counts of every sample so far, too.
        """
        if not self.labels:
            return
        self.collect()
        if is_main():
            line = {"global_epoch": epoch, "gates": self.labels, "classes": self.shares()}
            append_line(run.gates, json.dumps(line))
            if samples:
                counts = {"distilled": self.sample_chosen.cpu().numpy(), "seen": self.sample_seen.cpu().numpy()}
                file = run.epoch_gate_samples(epoch)
                file.parent.mkdir(exist_ok=True)
                with replacing(file) as stream:
                    np.savez_compressed(stream, **counts, labels=np.array(self.labels))
        self.reset()

    def reset(self) -> None:
        """Start the next epoch of the classes; the samples' counts go on."""
        self.chosen.zero_()
        self.seen.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        return {name: getattr(self, name).cpu() for name in ("chosen", "seen", "sample_chosen", "sample_seen")}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, value in state.items():
            getattr(self, name).copy_(value)
