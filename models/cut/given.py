"""Stages that a config spells out, for a network whose forward torch.fx cannot follow, or to choose others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from models.cut.view import Piece, compiled, is_used, prefix_tokens
from models.staged import global_pool
from utils.errors import UserError, doing

# For every stage the names of its steps: paths of submodules, operations, or as the very first `BEFORE` and a path.
Stages = Sequence[Sequence[str]]

BEFORE = "before "  # all that the network's forward does until it calls the submodule of the path that follows


def pool(x: Tensor, prefix: int = 0) -> Tensor:
    """Average over all positions of a map, or over the tokens ``[B, N, D]`` after the first `prefix`."""
    return x[:, prefix:].mean(dim=1) if x.dim() == 3 else global_pool(x)


def token(x: Tensor) -> Tensor:
    """The first of the tokens ``[B, N, D]``."""
    if x.dim() != 3:
        raise ValueError(f"token takes [B, N, D], not a tensor of shape {tuple(x.shape)}")
    return x[:, 0]


def flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, start_dim=1)


OPERATIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "flatten": flatten, "pool": pool, "token": token}


def given_pieces(network: nn.Module, stages: Stages) -> list[Piece]:
    """The stages of a config.

    Args:
        stages: for every stage its steps. A step is a submodule (``layer1``, ``features.3``), a slice of a Sequential
            (``features.0:4``) or one of the `OPERATIONS`; of a submodule and an operation of one name, the submodule.

    Raises:
        UserError: there is no such step.
    """
    if len(stages) < 2 or not all(stages):
        lengths = ", ".join(str(len(stage)) for stage in stages) or "none"
        raise UserError(f"two or more are needed, each of one or more steps; found with steps: {lengths}")
    if not stages[0][0].startswith(BEFORE):
        return [_chain(network, stage) for stage in stages]
    (before, *rest), *others = stages
    path = before.removeprefix(BEFORE)
    find_part(network, path)
    first, *later = (_chain(network, stage) for stage in (rest, *others))
    elsewhere = {name for piece in later for name in piece.names}
    names = frozenset(key for key in network.state_dict() if not is_used(key, elsewhere))
    return [Piece(lambda network, x: first.run(network, _argument_of(path, network, x)), names), *later]


def _chain(network: nn.Module, steps: Sequence[str]) -> Piece:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for step in chain.from_iterable(_expanded(network, step) for step in steps):
        if step in part_names(network) or step not in OPERATIONS:
            x = graph.call_module(step, (x,))
        else:
            options = {"prefix": prefix_tokens(network) or 0} if step == "pool" else {}
            x = graph.call_function(OPERATIONS[step], (x,), options)
    graph.output(x)
    return compiled(network, graph)


class _Reached(BaseException):
    """Ends a forward at the call of a submodule. No `Exception`, which the forward may catch."""

    def __init__(self, argument: Any):
        super().__init__()
        self.argument = argument


def _argument_of(path: str, network: nn.Module, x: Tensor) -> Tensor:
    """What the forward calls the submodule at `path` with.

    Raises:
        ValueError: it does not call it, or not with one tensor.
    """

    def end(_: nn.Module, arguments: tuple, options: dict) -> None:
        raise _Reached(only_tensor(*arguments, *options.values()))

    handle = network.get_submodule(path).register_forward_pre_hook(end, with_kwargs=True)
    try:
        network(x)
    except _Reached as reached:
        if reached.argument is not None:
            return reached.argument
    finally:
        handle.remove()
    raise ValueError(f"forward does not call {path!r} with one tensor")


def only_tensor(*values: object) -> Tensor | None:
    """The value that is not None, if it is the only one and a tensor."""
    given = [value for value in values if value is not None]
    return given[0] if len(given) == 1 and isinstance(given[0], Tensor) else None


def _expanded(network: nn.Module, step: str) -> list[str]:
    """The step, or the parts that a slice like ``features.0:4`` stands for."""
    owner, _, bounds = step.rpartition(".")
    if ":" not in bounds:
        if step not in OPERATIONS:
            find_part(network, step)
        return [step]
    parts = part_names(find_part(network, owner))
    with doing(f"taking the slice {step!r} of {listed(parts)}"):
        chosen = parts[slice(*(int(bound) if bound else None for bound in bounds.split(":", 1)))]
    if not chosen:
        raise UserError(f"the slice {step!r} is empty; the parts are {listed(parts)}")
    return [f"{owner}.{name}".removeprefix(".") for name in chosen]


def find_part(network: nn.Module, path: str) -> nn.Module:
    """The submodule at a dotted `path`; `network` itself for the empty one.

    Raises:
        UserError: there is none; the line names those that are there.
    """
    try:
        return network.get_submodule(path)
    except AttributeError:
        owner = path.rpartition(".")[0]
        there = listed(part_names(find_part(network, owner)))
        place = repr(owner) if owner else "the network"
        raise UserError(f"there is no {path!r}: {place} has {there}; operations are {listed(OPERATIONS)}") from None


def part_names(module: nn.Module) -> list[str]:
    """Names of the direct parts of `module`; unlike `named_children`, also of one that has two names."""
    return [name for name, part in module._modules.items() if part is not None]


def listed(names: Iterable[str], shown: int = 12) -> str:
    """`names` as a phrase, the first few of many."""
    names = list(names)
    rest = f", ... ({len(names)} in all)" if len(names) > shown else ""
    return (", ".join(names[:shown]) or "nothing") + rest
