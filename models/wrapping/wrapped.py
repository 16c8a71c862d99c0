"""The parts of any module, run as stages: what `models.wrapping.build` builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.staged import Stage, StagedModel, global_pool
from utils.errors import UserError

# For every stage the names of its steps: paths of parts, or operations.
Cuts = Sequence[Sequence[str]]

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "flatten": partial(torch.flatten, start_dim=1),
    "pool": global_pool,
}


class WrappedModel(StagedModel):
    """Holds the parts of `module` under their own names, and runs them as `cuts` says (without slices).

    Steps are looked up at every run, so a part that is replaced later (by SyncBatchNorm, say) takes effect.
    """

    def __init__(self, module: nn.Module, cuts: Cuts):
        super().__init__()
        self._cuts = cuts
        # Past `add_module`, which refuses the names of methods: many networks call a part `features`.
        self._modules.update(module._modules)
        self._parameters.update(module._parameters)
        self._buffers.update(module._buffers)
        self._non_persistent_buffers_set.update(module._non_persistent_buffers_set)

    def stages(self) -> list[Stage]:
        return [[self.step(name) for name in stage] for stage in self._cuts]

    def step(self, name: str) -> Callable[[Tensor], Tensor]:
        """The part at a path, or the operation of this name."""
        part, _, inner = name.partition(".")
        return self._modules[part].get_submodule(inner) if part in self._modules else OPERATIONS[name]


def expand_slices(module: nn.Module, stages: Cuts) -> Cuts:
    """`stages` with every slice replaced by the parts it stands for.

    Raises:
        UserError: a step is neither a part of `module` nor an operation.
    """
    return [[name for step in stage for name in _expand_step(module, step)] for stage in stages]


def _expand_step(module: nn.Module, step: str) -> list[str]:
    owner, _, last = step.rpartition(".")
    if ":" in last:
        prefix = f"{owner}." if owner else ""
        return [prefix + key for key in _slice_keys(find_part(module, owner), step, last)]
    if step not in OPERATIONS:
        find_part(module, step)
    return [step]


def _slice_keys(sequence: nn.Module, step: str, bounds: str) -> list[str]:
    """Keys of the parts of `sequence` within `bounds`, which look like ``"0:4"``."""
    if not isinstance(sequence, nn.Sequential | nn.ModuleList):
        raise UserError(f"stages: {step!r} slices a {type(sequence).__name__}, and only a Sequential has slices")
    try:
        start, stop = (int(bound) if bound else None for bound in bounds.split(":"))
    except ValueError:
        raise UserError(f"stages: {step!r} is not a slice; one looks like 'features.0:4'") from None
    keys = list(sequence._modules)[start:stop]
    if not keys:
        raise UserError(f"stages: the slice {step!r} is empty; the parts are {listed(sequence._modules)}")
    return keys


def find_part(module: nn.Module, path: str) -> nn.Module:
    """The part of `module` at a dotted `path`; `module` itself for the empty one.

    Raises:
        UserError: there is none; the line names the parts that are there.
    """
    keys = path.split(".") if path else []
    for depth, key in enumerate(keys):
        parts = part_names(module)
        if key not in parts:
            owner = repr(".".join(keys[:depth])) if depth else "the network"
            known = f"{owner} has {listed(parts)}; operations are {listed(OPERATIONS)}"
            raise UserError(f"stages: there is no {path!r}: {known}")
        module = module._modules[key]
    return module


def part_names(module: nn.Module) -> list[str]:
    """Names of the direct parts of `module`; unlike `named_children`, also of one that has two names."""
    return [name for name, part in module._modules.items() if part is not None]


def listed(names: Iterable[str], shown: int = 12) -> str:
    """`names` as a phrase, the first few of many."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "nothing") + rest


def explain(error: Exception) -> str:
    """Kind and first line of what another's code has raised."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])
