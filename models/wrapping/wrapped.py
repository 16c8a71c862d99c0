"""The parts of any module, run as stages: what `models.wrapping.build` builds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.staged import Stage, StagedModel, global_pool
from models.wrapping.layout import Layout
from utils.errors import UserError

# For every stage the names of its steps: paths of parts, operations, or as the very first `BEFORE` and a path.
Cuts = Sequence[Sequence[str]]

BEFORE = "before "  # all that the module's forward does until it calls the part of the path that follows
WHOLE: Cuts = (("forward",), ())  # one piece: the only feature is the vector of the logits


def _pool(x: Tensor, prefix: int = 0) -> Tensor:
    """Average over all positions of a map, or over the tokens ``[B, N, D]`` after the first `prefix`."""
    return x[:, prefix:].mean(dim=1) if x.dim() == 3 else global_pool(x)


def _first_token(x: Tensor) -> Tensor:
    if x.dim() != 3:
        raise ValueError("token takes [B, N, D]")
    return x[:, 0]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "flatten": partial(torch.flatten, start_dim=1),
    "pool": _pool,
    "token": _first_token,
}


class _Reached(BaseException):
    """Ends a forward at the call of a part. No `Exception`, which the forward may catch."""

    def __init__(self, argument: Any):
        super().__init__()
        self.argument = argument


class WrappedModel(StagedModel):
    """Holds the parts of `module` under their own names, and runs them as `cuts` says (without slices).

    Steps are looked up at every run, so a part that is replaced later (by SyncBatchNorm, say) takes effect.

    Args:
        module: the network.
        cuts: its stages.
        layouts: how each feature becomes a map, see `models.wrapping.layout`; none: they are maps and vectors already.
        uncut: why there are not more stages.
    """

    def __init__(self, module: nn.Module, cuts: Cuts, layouts: Sequence[Layout] = (), uncut: str = ""):
        super().__init__()
        self._cuts, self._layouts = cuts, tuple(layouts)
        self.uncut, self.one_piece = uncut, cuts == WHOLE
        self.training = module.training
        self._whole = (module,)  # in a tuple, so that it is no submodule
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Have the very dictionaries of the module, so that whatever is replaced is replaced in both."""
        (module,) = self._whole
        for name in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
            self.__dict__[name] = module.__dict__[name]

    def stages(self) -> list[Stage]:
        return [[self.step(name) for name in stage] for stage in self._cuts]

    def step(self, name: str) -> Callable[[Tensor], Tensor]:
        """The part at a path, or the operation of this name."""
        if name == WHOLE[0][0]:
            return self._forward
        if name.startswith(BEFORE):
            return partial(self._before, name.removeprefix(BEFORE))
        part, _, inner = name.partition(".")
        if part in self._modules:
            return self._modules[part].get_submodule(inner)
        return partial(_pool, prefix=prefix_tokens(self._whole[0]) or 0) if name == "pool" else OPERATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        # torch.export cannot follow a forward that ends early.
        return self._forward(x) if self._cuts[0][0].startswith(BEFORE) else self.run(x)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if layout := self._layout(start - 1):
            x = layout.from_map(x)
        x = super().run(x, start, stop)
        layout = None if stop is None else self._layout(stop - 1)
        return layout.to_map(x) if layout else x

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features, logits = super().features(x)
        layouts = [self._layout(k) for k in range(len(features))]
        return [layout.to_map(f) if layout else f for layout, f in zip(layouts, features)], logits

    def parameters_until(self, stop: int) -> list[nn.Parameter]:
        if not self._cuts[0][0].startswith(BEFORE):
            return super().parameters_until(stop)
        later = {parameter for stage in self.stages()[stop:] for parameter in _parameters(stage)}
        return [parameter for parameter in self.parameters() if parameter not in later]

    def _layout(self, feature: int) -> Layout:
        return self._layouts[feature] if 0 <= feature < len(self._layouts) else None

    def _forward(self, x: Tensor) -> Tensor:
        (module,) = self._whole
        module.training = self.training
        return module(x)

    def _before(self, path: str, x: Tensor) -> Tensor:
        """What the part at `path` is called with.

        Raises:
            ValueError: it is not called, or not with one tensor.
        """

        def end(_: nn.Module, arguments: tuple, options: dict) -> None:
            raise _Reached(only_tensor(*arguments, *options.values()))

        part, _, inner = path.partition(".")
        handle = self._modules[part].get_submodule(inner).register_forward_pre_hook(end, with_kwargs=True)
        try:
            self._forward(x)
        except _Reached as reached:
            if reached.argument is not None:
                return reached.argument
        finally:
            handle.remove()
        raise ValueError(f"forward does not call {path!r} with one tensor")


def _parameters(stage: Stage) -> Iterable[nn.Parameter]:
    return (parameter for step in stage if isinstance(step, nn.Module) for parameter in step.parameters())


def prefix_tokens(module: nn.Module) -> int | None:
    """How many tokens of a transformer of timm are about the whole image; None of other modules."""
    number = getattr(module, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def only_tensor(*values: object) -> Tensor | None:
    """The value that is not None, if it is the only one and a tensor."""
    given = [value for value in values if value is not None]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def expand_slices(module: nn.Module, stages: Cuts) -> Cuts:
    """`stages` with every slice replaced by the parts it stands for.

    Raises:
        UserError: a step is neither a part of `module` nor an operation.
    """
    return [[name for step in stage for name in _expand_step(module, step)] for stage in stages]


def _expand_step(module: nn.Module, step: str) -> list[str]:
    if step.startswith(BEFORE):
        find_part(module, step.removeprefix(BEFORE))
        return [step]
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
