"""A network cut into consecutive stages, the shape in which this project sees every model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models.pooling import average_pool

Stage = Sequence[Callable[[Tensor], Tensor]]
Network = TypeVar("Network", bound=nn.Module)


class StagedModel(nn.Module):
    """Base class of every network here: an ordered list of stages, each ending in a *feature*.

    With ``n`` features there are ``n + 1`` stages: stage ``k < n`` ends in feature ``k``, feature
    ``n - 1`` is the pooled vector ``[B, D]``, and the last stage is the classifier. A subclass defines
    its modules (whose names are the `state_dict` keys) and says in `stages` how they follow one another.

    Attributes:
        uncut: why the network could not be cut into more stages; empty if nothing was in the way.
        one_piece: the network has one feature, and that is its logits.
    """

    uncut: str = ""
    one_piece: bool = False

    def stages(self) -> Sequence[Stage]:
        """The stages in order; each is a sequence of callables applied one after another."""
        raise NotImplementedError

    def run(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Apply stages ``start .. stop - 1``: from an image (``start=0``) or from feature ``start - 1``
        to feature ``stop - 1``, or to the logits if `stop` is None."""
        for stage in self.stages()[start:stop]:
            for step in stage:
                x = step(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits ``[B, num_classes]``."""
        return self.run(x)

    def features(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images ``[B, 3, H, W]`` to the list of the ``n`` features and the logits ``[B, num_classes]``."""
        features = []
        for stage in self.stages():
            for step in stage:
                x = step(x)
            features.append(x)
        return features[:-1], features[-1]

    def stage_tensors(self, start: int = 0, stop: int | None = None) -> list[Tensor]:
        """Parameters and persistent buffers of the stages ``start .. stop - 1``."""
        # Steps without parameters may be plain functions.
        steps = (step for stage in self.stages()[start:stop] for step in stage if isinstance(step, nn.Module))
        return list(nn.ModuleList(steps).state_dict(keep_vars=True).values())

    def parameters_until(self, stop: int) -> list[nn.Parameter]:
        """The parameters of the stages ``0 .. stop - 1``, each once."""
        tensors = self.stage_tensors(stop=stop)
        return list(dict.fromkeys(tensor for tensor in tensors if isinstance(tensor, nn.Parameter)))

    @torch.no_grad()
    def shapes(self, height: int, width: int) -> tuple[list[tuple[int, ...]], tuple[int, ...]]:
        """Shapes of all features and of the logits, without the batch dimension, for images of `height` x `width`.

        Leaves the model as it was: training mode, running statistics, random state.
        """
        reference = next(self.parameters())
        image = torch.zeros(1, 3, height, width, device=reference.device, dtype=reference.dtype)
        features, logits = copy_in_mode(self).features(image)
        return [tuple(feature.shape[1:]) for feature in features], tuple(logits.shape[1:])

    def feature_shapes(self, height: int, width: int) -> list[tuple[int, ...]]:
        """Shape of every feature, see `shapes`."""
        return self.shapes(height, width)[0]


def constants(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module that a graph of its forward has as constants: numbers, words and truth values."""
    return {name: v for name, v in vars(module).items() if isinstance(v, int | float | str) and name != "training"}


def copied(network: Network, tensors: Mapping[int, Tensor] | None = None) -> Network:
    """A copy of the network, in which `tensors` stand for those of these ids.

    What every forward computes of parameters (`torch.nn.utils.weight_norm`) cannot be copied with its history.
    """
    values = (value for module in network.modules() for value in (*vars(module).values(), *module._buffers.values()))
    computed = {id(v): v.detach() for v in values if isinstance(v, Tensor) and not v.is_leaf}
    return copy.deepcopy(network, computed | dict(tensors or {}))


def copy_in_mode(network: Network, mode: bool = False) -> Network:
    """A copy of the network in a mode, since a run may change what it remembers; the parameters are shared."""
    return copied(network, {id(tensor): tensor for tensor in network.parameters()}).train(mode)


def global_pool(x: Tensor) -> Tensor:
    """Average over all positions: ``[B, C, H, W]`` to ``[B, C]``."""
    return average_pool(x, 1, 1).flatten(1)
