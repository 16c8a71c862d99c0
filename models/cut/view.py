"""The staged view of a network that is not one of ours, and how a feature of any shape is seen as a map.

The rule for a feature between two stages:

* ``[B, H, W, C]``: its first two sizes stand to each other as the sides of the image do, and the last two do not. It
  becomes ``[B, C, H, W]``.
* ``[B, N, D]``: tokens. The last ``h * w`` of them lie on a grid, by rows, whose sides stand to each other as those of
  the image do. The ``P = N - h * w`` before them (a class token, registers) are about the whole image and are repeated
  at every position: ``[B, (1 + P) * D, h, w]``.

Nothing is lost, so a network goes on from what it is handed: of the repeated tokens it takes the mean over all
positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

from models.cut.trace import has_gradients, logits_of
from models.staged import Stage, StagedModel, constants
from utils.errors import UserError, doing

MOST_PREFIX_TOKENS = 8  # beyond, tokens are no image


@dataclass(frozen=True)
class ChannelsLast:
    """Maps ``[B, H, W, C]``."""

    def to_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def from_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1)


@dataclass(frozen=True)
class Tokens:
    """Tokens ``[B, prefix + height * width, D]``."""

    prefix: int
    height: int
    width: int

    def to_map(self, x: Tensor) -> Tensor:
        size = (self.height, self.width)
        image = x[:, self.prefix :].transpose(1, 2).unflatten(2, size)
        if not self.prefix:
            return image
        whole = x[:, : self.prefix].flatten(1)[:, :, None, None].expand(-1, -1, *size)
        return torch.cat([image, whole], dim=1)

    def from_map(self, x: Tensor) -> Tensor:
        width = x.shape[1] // (1 + self.prefix)
        image = x[:, :width].flatten(2).transpose(1, 2)
        if not self.prefix:
            return image
        whole = x[:, width:].mean(dim=(2, 3)).unflatten(1, (self.prefix, width))
        return torch.cat([whole, image], dim=1)


Layout = ChannelsLast | Tokens | None  # None: a map or a vector already


def find_layout(shape: Sequence[int], image_size: tuple[int, int], prefix: int | None = None) -> Layout:
    """How a feature of `shape` (without the batch dimension) becomes a map.

    Args:
        image_size: height and width of the images.
        prefix: how many tokens are about the whole image, if that is known.

    Raises:
        UserError: it cannot.
    """
    if len(shape) == 1:
        return None
    if len(shape) == 3:
        return ChannelsLast() if _alike(shape[:2], image_size) and not _alike(shape[1:], image_size) else None
    if len(shape) == 2:
        for height, width in _grids(image_size):
            spare = shape[0] - height * width
            if spare >= 0 and (spare == prefix or (prefix is None and spare <= MOST_PREFIX_TOKENS)):
                return Tokens(spare, height, width)
            if spare >= 0 and prefix is None:
                break
    raise UserError(f"shape {tuple(shape)} is no vector, map or tokens on a grid; let the stage end elsewhere")


def prefix_tokens(network: nn.Module) -> int | None:
    """How many tokens of a transformer of timm are about the whole image; None of other networks."""
    number = getattr(network, "num_prefix_tokens", None)
    return number if isinstance(number, int) else None


def _alike(sides: Sequence[int], image_size: tuple[int, int]) -> bool:
    """Whether these are the sides of the image, divided by one number and rounded."""
    (height, width), (rows, columns) = image_size, sides
    return abs(rows * width - columns * height) <= max(image_size)


def _grids(image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Sizes of patch grids, the finest first."""
    height, width = image_size
    return [(height // patch, width // patch) for patch in range(1, min(image_size) + 1)]


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
        layouts: how each feature becomes a map, see above.
        overwriting: indices of the stages that overwrite the feature before them; they get a copy.
        uncut, one_piece: see `StagedModel`.
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
        self._opened: Collection[str] = ()
        self._constants: list[dict[str, Any]] = []

    def follow_changes(self, opened: Collection[str], follow: Callable[[nn.Module], Mapping[bool, Sequence[Piece]]]):
        """Let `follow` give the pieces anew whenever `constants` of the modules at the paths `opened` change."""
        self._opened, self._follow = opened, follow
        self._constants = self._read_constants()

    def take_stages_of(self, other: StagedView) -> None:
        """Take the pieces of the view of another copy of the network."""
        other.stages()  # follows what has changed
        self.pieces, self._constants = other.pieces, other._constants

    def _read_constants(self) -> list[dict[str, Any]]:
        return [constants(self.network.get_submodule(path)) for path in self._opened]

    @property
    def training(self) -> bool:
        """The mode is the network's, which may also be a part of a module of the user."""
        return self.network.training

    @training.setter
    def training(self, mode: bool) -> None:
        """`train` sets that of the network."""

    def forward(self, x: Tensor) -> Tensor:
        return logits_of(self.network(x))

    def stages(self) -> list[Stage]:
        if self._opened and (now := self._read_constants()) != self._constants:
            with doing("following its forward again, because a number among its attributes has changed,"):
                self.pieces, self._constants = self._follow(self.network), now
        return [[partial(self.run_stage, index)] for index in range(len(self.pieces[False]))]

    def run_stage(self, index: int, x: Tensor) -> Tensor:
        """Apply one stage to the feature before it. Both are in the shape that the network itself gives them."""
        if index in self.overwriting:
            x = x.clone()
        return self.pieces[self.training][index].run(self.network, x)

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
        names = {name for piece in self.pieces[self.training][start:stop] for name in piece.names}
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
