"""Following the forward of a network with torch.fx: its operations, where they are made, and where to cut."""

from __future__ import annotations

import builtins
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from models.staged import constants

Call = tuple[str, int]  # a path or an operation, and how often its caller has called it before
Place = tuple[Call, ...]  # the calls from the network's forward down to an operation


def shared(places: Iterable[Place]) -> Place:
    """The calls that all places have in common, beginning with the outermost."""
    levels = zip(*places)  # ends with the shortest place
    return tuple(calls[0] for calls in takewhile(lambda calls: len(set(calls)) == 1, levels))


def logits_of(output: Any) -> Any:
    """What a forward returns; of a dictionary or an object that has ``logits``, these alone."""
    if isinstance(output, Tensor | fx.Proxy):
        return output
    return output["logits"] if isinstance(output, dict) and "logits" in output else getattr(output, "logits", output)


class PlaceTracer(fx.Tracer):
    """Records where in the calls of submodules every operation is made, as ``node.meta["place"]``.

    A submodule is one node, a call of it, if torch.fx cannot follow what it does, for example decisions that depend on
    the image. So it is if a graph would not repeat what it does: random numbers and tensors that are made without the
    image would be constants of the graph, and so would a number that the forward counts up.

    Args:
        opened: paths of the submodules that are followed; None: all but those of ``torch.nn``.
    """

    def __init__(self, opened: Collection[str] | None = None):
        super().__init__()
        self._opened = opened

    def trace(self, root: nn.Module, *args: Any, **kwargs: Any) -> fx.Graph:
        self._callers: list[tuple[Place, Counter]] = [((), Counter())]
        self._own = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        with torch.enable_grad(), _traced_len():
            return _repeatable(root, lambda: super(PlaceTracer, self).trace(root, *args, **kwargs))

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        image = self.create_proxy("placeholder", "image", (), {})
        return lambda *images: logits_of(root_fn(*images)), [self.root, image]  # other arguments keep their defaults

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._opened is not None:
            return module_qualified_name not in self._opened
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        path, known = self.path_of_module(m), len(self.graph.nodes)
        self._callers.append((self._next_place(path), Counter()))
        try:
            if not self.is_leaf_module(m, path):
                with suppress(Exception):  # whatever code that is not ours does with the placeholders of torch.fx
                    return _repeatable(m, lambda: forward(*args, **kwargs))
                for node in reversed(list(self.graph.nodes)[known:]):
                    self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)
        finally:
            self._callers.pop()

    def create_node(self, kind: str, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = super().create_node(kind, target, *args, **kwargs)
        node.meta["place"] = self._callers[-1][0] if kind == "call_module" else self._next_place(str(target))
        node.meta["grad"] = torch.is_grad_enabled()
        return node

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, Tensor) and id(a) not in self._own and a not in self.tensor_attrs:
            raise TraceError("its forward makes a tensor that does not depend on the image")
        return super().create_arg(a)

    def _next_place(self, name: str) -> Place:
        place, counts = self._callers[-1]
        counts[name] += 1
        return (*place, (name, counts[name]))


def _repeatable(module: nn.Module, follow: Callable[[], Any]) -> Any:
    """What `follow`, the forward of `module`, returns.

    Raises:
        TraceError: it draws random numbers, or changes a number of the module.
    """
    before, numbers = _random_states(), constants(module)
    result = follow()
    if _random_states() != before:
        raise TraceError("its forward draws random numbers outside of PyTorch's modules and functions of the image")
    if changed := constants(module).items() - numbers.items():
        raise TraceError(f"its forward changes its attribute {min(changed)[0]!r}")
    return result


@contextmanager
def _traced_len() -> Iterator[None]:
    """Make ``len(x)`` an operation like ``x.size(0)``; otherwise Python asks torch.fx for a number."""

    def traced(value: Any) -> Any:
        return (
            value.tracer.create_proxy("call_function", own, (value,), {}) if isinstance(value, fx.Proxy) else own(value)
        )

    own, builtins.len = builtins.len, traced
    try:
        yield
    finally:
        builtins.len = own


def _random_states() -> tuple:
    return random.getstate(), torch.get_rng_state().numpy().tobytes()


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the shape of every tensor in it as ``node.meta["shape"]``, without the batch dimension."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape[1:])
        return result


@torch.no_grad()
def record_shapes(network: nn.Module, graph: fx.Graph, images: Tensor) -> None:
    """Set ``node.meta["shape"]`` of every node of `graph` that is a tensor."""
    _Recorder(network, graph=graph).run(images)


def cut_points(graph: fx.Graph) -> list[fx.Node]:
    """The nodes behind which nothing but their own result is needed, so that the graph can be cut there."""
    nodes = [node for node in graph.nodes if node.op != "get_attr"]
    last_use = {used: index for index, node in enumerate(nodes) for used in node.all_input_nodes}
    alive: set[fx.Node] = set()
    found = []
    for index, node in enumerate(nodes[:-1]):  # the last one is the output
        alive = {other for other in (*alive, node) if last_use.get(other, -1) > index}
        if alive == {node} and node.op != "placeholder":
            found.append(node)
    return found


def slices(graph: fx.Graph, ends: Collection[fx.Node]) -> list[fx.Graph]:
    """`graph` in pieces of one input and one output each, cut behind every node of `ends`.

    Raises:
        TraceError: it gives something else than one tensor, or turns gradients off in the middle of a piece.
    """
    pieces, copies = [fx.Graph()], {}

    def copy_of(node: fx.Node) -> fx.Node:
        if node not in copies:  # a parameter, which is read where it is used
            copies[node] = pieces[-1].node_copy(node, copy_of)
        return copies[node]

    for node in graph.nodes:
        if node.op == "output":
            if not isinstance(node.args[0], fx.Node):
                raise TraceError("its forward does not return a single tensor")
            pieces[-1].output(copy_of(node.args[0]))
        elif node.op != "get_attr":
            copy_of(node)
        if node in ends:
            pieces[-1].output(copies[node])
            pieces.append(fx.Graph())
            copies.clear()
            copies[node] = pieces[-1].placeholder("x")
    if any(len(_grad_modes(piece)) > 1 for piece in pieces):
        raise TraceError("its forward turns gradients off (torch.no_grad) between two ends of stages")
    return pieces


def _grad_modes(piece: fx.Graph) -> set[bool]:
    return {node.meta.get("grad", True) for node in piece.nodes if node.op not in ("placeholder", "get_attr", "output")}


def has_gradients(piece: fx.Graph) -> bool:
    """Whether the forward computes what `piece` does with gradients."""
    return _grad_modes(piece) != {False}
