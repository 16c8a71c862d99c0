"""The staged view of a network that is not one of ours."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.cut.layout import Layout
from models.cut.trace import has_gradients
from models.staged import Stage, StagedModel


@dataclass(frozen=True)
class Piece:
    """What one stage does.

    Attributes:
        run: called with the network and the feature before.
        names: paths of the submodules and parameters of the network that it uses.
    """

    run: Callable[[nn.Module, Tensor], Tensor]
    names: frozenset[str]


def compiled(network: nn.Module, graph: fx.Graph) -> Piece:
    """A graph as a piece, which looks up submodules of `network` when it runs, so any copy of the network will do."""
    forward = type(fx.GraphModule(network, graph)).forward
    run = forward if has_gradients(graph) else torch.no_grad()(forward)
    return Piece(run, frozenset(node.target for node in graph.nodes if node.op in ("call_module", "get_attr")))


class StagedView(StagedModel):
    """A network that is not ours, as stages.

    The network keeps its forward, its `train` and its names: `state_dict` has the network's own keys, and whatever is
    replaced in the network later (by SyncBatchNorm, say) takes effect in the stages.

    Args:
        network: the network, under this name the only submodule.
        pieces: what its stages do, in evaluation and in training mode.
        layouts: how each feature becomes a map, see `models.cut.layout`.
        overwriting: indices of the stages that overwrite the feature before them; they get a copy.
        uncut: why there are not more stages, where something is in the way.
        one_piece: the only feature is the vector of the logits.
    """

    def __init__(
        self,
        network: nn.Module,
        pieces: Mapping[bool, Sequence[Piece]],
        layouts: Sequence[Layout] = (),
        overwriting: Collection[int] = (),
        uncut: str = "",
        one_piece: bool = False,
    ):
        super().__init__()
        self.network = network
        self.pieces, self.layouts, self.overwriting = pieces, layouts, overwriting
        self.uncut, self.one_piece = uncut, one_piece
        self.training = network.training

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def stages(self) -> list[Stage]:
        return [[partial(self.run_stage, index)] for index in range(len(self.pieces[False]))]

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """Apply one stage to the feature before it. Both are in the shape that the network itself gives them."""
        if index in self.overwriting:
            x = x.clone()
        return self.pieces[self.network.training][index].run(self.network, x)

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if layout := self._layout(start - 1):
            x = layout.from_map(x)
        x = super().run(x, start, stop)
        layout = None if stop is None else self._layout(stop - 1)
        return layout.to_map(x) if layout else x

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features, logits = super().features(x)
        layouts = [self._layout(index) for index in range(len(features))]
        return [layout.to_map(f) if layout else f for layout, f in zip(layouts, features)], logits

    def stage_tensors(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        names = {name for piece in self.pieces[self.network.training][start:stop] for name in piece.names}
        return [tensor for key, tensor in self.network.state_dict(keep_vars=True).items() if is_used(key, names)]

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.network.state_dict(*args, **kwargs)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        state = OrderedDict(state_dict)
        # Weights of a run are a plain dictionary, without the versions that some networks ask for: they are today's.
        state._metadata = getattr(state_dict, "_metadata", self.state_dict()._metadata)
        return self.network.load_state_dict(state, strict, assign)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As a part of a larger module: let PyTorch find the network's entries under the name of the submodule."""
        for key in [key for key in state_dict if key.startswith(prefix)]:
            state_dict[f"{prefix}network.{key.removeprefix(prefix)}"] = state_dict.pop(key)

    def _layout(self, feature: int) -> Layout:
        return self.layouts[feature] if 0 <= feature < len(self.layouts) else None


def is_used(key: str, names: Collection[str]) -> bool:
    """Whether an entry of the `state_dict` is among the submodules and tensors that `names` are the paths of."""
    return any(f"{key}.".startswith(f"{name}.") for name in names)


def original(model: nn.Module) -> nn.Module:
    """The network that a model is a view of; any other model as it is."""
    return model.network if isinstance(model, StagedView) else model
