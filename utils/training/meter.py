"""Means over an epoch, kept on the device and read once in a while."""

from __future__ import annotations

import torch
from torch import Tensor

from utils.errors import UserError
from utils.processes.group import all_sum, gather_objects, rank, world_size


class Meter:
    """Sums of named scalars, weighted by the number of samples; reading them is the only host sync of an epoch.

    Each process has the sums of its own samples. Reading adds them up, so all processes have to do it together.

    The tensors stay the same ones from the first `add` on, whatever is added or reset: a CUDA graph may write to them.

    Args:
        device: where the sums live.

    Attributes:
        count: samples of this process so far.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.empty = True
        self.finite_steps: Tensor | None = None  # for each name, how many steps its sum was finite

    def add(self, values: dict[str, Tensor], samples: int) -> None:
        """Add means over `samples` samples. The names must be the same at every call."""
        self.accumulate(values, samples)
        self.tally(samples)

    def accumulate(self, values: dict[str, Tensor], samples: int) -> None:
        """The part of `add` that is the device's."""
        row = torch.stack(list(values.values())).double() * samples
        if self.sums is None:
            self.names, self.sums = list(values), torch.zeros_like(row)
            self.finite_steps = torch.zeros_like(row, dtype=torch.int64)
        if list(values) != self.names:
            raise UserError(
                f"every step of an epoch must log the same values, but {', '.join(sorted({*values} ^ {*self.names}))} "
                "is new or missing; a run that was stopped within an epoch is resumed with the settings it had then"
            )
        self.sums += row
        self.finite_steps += self.sums.isfinite()  # a sum that is not finite stays so

    def tally(self, samples: int) -> None:
        """The part of `add` that is the host's."""
        self.count += samples
        self.empty = False

    def reset(self) -> None:
        """Begin another epoch, with the same names."""
        if self.sums is not None:
            self.sums.zero_()
            self.finite_steps.zero_()
        self.count, self.empty = 0, True

    def means(self) -> dict[str, float]:
        """Mean of every name so far, over the samples of all processes; waits for the device."""
        if self.empty:
            return {}
        sums, count = all_sum(self.sums, torch.tensor(self.count, dtype=torch.float64, device=self.device))
        return dict(zip(self.names, (sums / count).tolist()))

    def first_bad_step(self) -> tuple[int, list[str]]:
        """Number of the first step, counted from 1, after which sums were no longer finite, and their names.

        Waits for the device.
        """
        finite = gather_objects(self.finite_steps.tolist())
        least = min(map(min, finite))
        return 1 + least, [name for name, steps in zip(self.names, zip(*finite)) if least in steps]

    def state_dict(self) -> dict:
        if self.empty:
            return {"names": [], "sums": None, "count": self.count, "finite_steps": 0}
        finite_steps = int(self.finite_steps.min())
        return {"names": self.names, "sums": self.sums.cpu(), "count": self.count, "finite_steps": finite_steps}

    def load_state_dicts(self, states: list[dict]) -> None:
        """Go on from what all processes of the run had; there may be more or fewer of them now."""
        own = states[rank() :: world_size()]
        self.names, self.count = list(states[0]["names"]), sum(state["count"] for state in own)
        self.empty = states[0]["sums"] is None
        if not self.empty:
            zero = torch.zeros_like(states[0]["sums"])
            self.sums = sum((state["sums"] for state in own), start=zero).to(self.device)
            # The same for all names and processes: only a finite state is saved.
            self.finite_steps = torch.full_like(self.sums, states[0]["finite_steps"], dtype=torch.int64)


def ranks(logits: Tensor, label: Tensor) -> Tensor:
    """The rank of each label among the classes by their logits, 0 for the largest one, int64 ``[B]``.

    Of equal logits the first one comes first, as it does for ``argmax``; ``topk`` promises no order. A label whose
    logit is NaN comes last, and another logit that is NaN before it.

    Args:
        logits: ``[B, num_classes]``.
        label: ``[B]``.
    """
    label = label[:, None]
    own = logits.gather(1, label)
    first = (logits == own) & (torch.arange(logits.shape[1], device=logits.device) < label)
    return (~(logits <= own) | first).sum(dim=1)


def top_k_hits(logits: Tensor, label: Tensor) -> dict[str, Tensor]:
    """Which samples have their label among the k largest logits, bool ``[B]``, see `ranks`.

    Returns:
        ``top1``, and ``top5`` where there are more than five classes.
    """
    found = ranks(logits, label)
    return {f"top{k}": found < k for k in (1, 5) if k == 1 or k < logits.shape[1]}


def accuracy_text(means: dict[str, float]) -> str:
    """``"val 91.20% top-5 99.80%"``, from validation means."""
    text = f"val {means['top1']:.2f}%" + (f" top-5 {means['top5']:.2f}%" if "top5" in means else "")
    return text + (f" EMA {means['ema/top1']:.2f}%" if "ema/top1" in means else "")


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold something infinite or no number; waits for the device once."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    finite = torch.stack([tensor.isfinite().all() for tensor in floats.values()]).tolist()
    return [name for name, fine in zip(floats, finite) if not fine]
