"""Stages that a config spells out, for a network whose forward torch.fx cannot follow, or to choose others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def pool(x: Tensor, prefix: int | None) -> Tensor:
    """Average over all positions of a map, or over the tokens ``[B, N, D]`` after the first `prefix`."""
    return x[:, prefix or 0 :].mean(dim=1) if x.dim() == 3 else global_pool(x)


def flatten(x: Tensor) -> Tensor:
    return torch.flatten(x, start_dim=1)


def token(x: Tensor) -> Tensor:
    """The first of the tokens ``[B, N, D]``."""
    return x[:, 0]


OPERATIONS: dict[str, Callable[..., Tensor]] = {"relu": F.relu, "flatten": flatten, "pool": pool, "token": token}


def given_pieces(network: nn.Module, stages: Stages) -> list[Piece]:
    """The stages of a config.

    Args:
        stages: for every stage its steps. A step is a submodule (``layer1``, ``features.3``), a slice of a Sequential
            (``features.0:4``) or one of the `OPERATIONS`; of a submodule and an operation of one name, the submodule.

    Raises:
        UserError: there are fewer than two stages, or there is no such step.
    """
    if len(stages) < 2 or not all(stages):
        raise UserError("two or more are needed, each of one or more steps")
    (before, *rest), *others = stages
    if not before.startswith(BEFORE):
        return [_chain(network, stage) for stage in stages]
    path = before.removeprefix(BEFORE)
    with doing(f"finding {path!r}"):
        network.get_submodule(path)
    first, *later = (_chain(network, stage) for stage in (rest, *others))
    elsewhere = {name for piece in later for name in piece.names}
    names = frozenset(key for key in network.state_dict() if not is_used(key, elsewhere))
    return [Piece(lambda network, x: first.run(network, _argument_of(path, network, x)), names), *later]


def _chain(network: nn.Module, steps: Sequence[str]) -> Piece:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for step in steps:
        if step in OPERATIONS and not isinstance(getattr(network, step, None), nn.Module):
            options = {"prefix": prefix_tokens(network)} if step == "pool" else {}
            x = graph.call_function(OPERATIONS[step], (x,), options)
            continue
        with doing(f"finding {step!r}, which is no operation ({', '.join(OPERATIONS)}),"):
            for path in _expanded(network, step):
                network.get_submodule(path)
                x = graph.call_module(path, (x,))
    graph.output(x)
    return compiled(network, graph)


def _expanded(network: nn.Module, step: str) -> list[str]:
    """The step, or the parts that a slice like ``features.0:4`` stands for."""
    owner, _, bounds = step.rpartition(".")
    if ":" not in bounds:
        return [step]
    chosen = slice(*(int(bound) if bound else None for bound in bounds.split(":", 1)))
    # Not `named_children`, which leaves the second name of a part out.
    return [f"{owner}.{name}".removeprefix(".") for name in [*network.get_submodule(owner)._modules][chosen]]


class _Reached(BaseException):
    """Ends a forward at the call of a submodule. No `Exception`, which the forward may catch."""

    def __init__(self, arguments: list[Any]):
        super().__init__()
        self.arguments = arguments


def _argument_of(path: str, network: nn.Module, x: Tensor) -> Tensor:
    """What the forward calls the submodule at `path` with.

    Raises:
        ValueError: it does not call it, or not with one tensor.
    """

    def end(_: nn.Module, arguments: tuple, options: dict) -> None:
        raise _Reached([value for value in (*arguments, *options.values()) if value is not None])

    handle = network.get_submodule(path).register_forward_pre_hook(end, with_kwargs=True)
    try:
        network(x)
    except _Reached as reached:
        if len(reached.arguments) == 1 and isinstance(reached.arguments[0], Tensor):
            return reached.arguments[0]
    finally:
        handle.remove()
    raise ValueError(f"forward does not call {path!r} with one tensor")
