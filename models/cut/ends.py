"""Choosing where a network is cut, from the graph of its whole forward."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.fx.proxy import TraceError
from torch.nn.modules.dropout import _DropoutNd

from models.cut.trace import Place, cut_points, shared
from models.cut.view import Tokens, find_layout, prefix_tokens
from utils.errors import UserError

LONGEST_ROW = 4  # features at one resolution
RESNET = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4", "avgpool", "fc"]


@dataclass(frozen=True)
class Cut:
    """A node behind which the network can be cut.

    Attributes:
        node: of the graph.
        index: of the node in the graph.
        place: of the outermost call that ends with the node.
        opened: paths of the submodules that are still running there.
        closed: paths of the submodules that end there, the outermost first.
        resolution: ``"vector"``; layout and size of a map or of the grid of tokens; None for anything else.
    """

    node: fx.Node
    index: int
    place: Place
    opened: tuple[str, ...]
    closed: tuple[str, ...]
    resolution: Any


class Ends:
    """Chooses the ends of the stages of a network.

    Args:
        network: it is not changed.
        graph: of its whole forward, with the shapes of all nodes.
        image_size: height and width of the images.
    """

    def __init__(self, network: nn.Module, graph: fx.Graph, image_size: tuple[int, int]):
        self.network, self.nodes = network, list(graph.nodes)
        self.image_size, self.prefix = image_size, prefix_tokens(network)
        self.weighted = [index for index, node in enumerate(self.nodes) if self._has_weights(node)]
        calls = [node.meta["place"] for node in self.nodes if node.op == "call_module"]
        self.outside = shared(calls)  # where everything happens, as in a network within another
        self.cuts = [self._cut(node) for node in cut_points(graph) if "shape" in node.meta]

    def find(self) -> list[Cut]:
        """The ends of all stages but the last, which is the classifier.

        They are the features that timm names, or else the last cut of each resolution; then the vector that the
        classifier takes or, where there is none, the logits.
        """
        if not self.cuts:
            raise TraceError("all of it is one submodule that torch.fx cannot follow")
        vector = self._vector()
        maps = [cut for cut in self.cuts if cut.index < vector.index and cut.resolution not in (None, "vector")]
        return [*(self._named(maps) or self._by_resolution(maps, vector)), vector]

    def _cut(self, node: fx.Node) -> Cut:
        index, place = self.nodes.index(node), node.meta["place"]
        depth = len(shared([place, self.nodes[index + 1].meta["place"]]))
        paths = tuple(name for name, _ in place)
        return Cut(node, index, place[: depth + 1], paths[:depth], paths[depth:], self._resolution(node.meta["shape"]))

    def _resolution(self, shape: tuple[int, ...]) -> Any:
        try:
            layout = find_layout(shape, self.image_size, self.prefix)
        except UserError:
            return None
        if len(shape) == 1:
            return "vector"
        if isinstance(layout, Tokens):
            return Tokens, (layout.height, layout.width)
        return type(layout), shape[:2] if layout else shape[1:]

    def _has_weights(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return next(self.network.get_submodule(node.target).parameters(), None) is not None
        return any(source.op == "get_attr" for source in node.all_input_nodes)

    def _vector(self) -> Cut:
        """The last vector before the submodule that has the last weights, or else within it; or else the logits."""
        last = self.weighted[-1] if self.weighted else 0
        head = self.nodes[last].meta["place"][: len(self.outside) + 1]
        start = next(k for k, node in enumerate(self.nodes) if node.meta["place"][: len(head)] == head)
        vectors = [cut for cut in self.cuts if cut.resolution == "vector" and not self._is_dropout(cut.node)]
        for end in (start, last):
            if before := [cut for cut in vectors if cut.index < end]:
                return before[-1]
        return self.cuts[-1]

    def _is_dropout(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return isinstance(self.network.get_submodule(node.target), _DropoutNd)
        return node.target is F.dropout

    def _named(self, maps: Sequence[Cut]) -> list[Cut]:
        """The cuts at which timm says that there are features; of a torchvision ResNet, its layers."""
        info = getattr(self.network, "feature_info", None)
        if [name for name, _ in self.network.named_children()] == RESNET:
            info = [{"module": name, "reduction": name} for name in RESNET[3:8]]
        if not isinstance(info, list) or not all(isinstance(entry, dict) for entry in info):
            return []
        rows: dict[Any, list[Cut]] = {}
        for entry in info:
            ending = [cut for cut in maps if _touches(cut, str(entry.get("module")))]
            rows.setdefault(entry.get("reduction"), []).extend(ending[-1:])
        chosen = {cut.index: cut for row in rows.values() for cut in shortened(row)}
        return [chosen[index] for index in sorted(chosen)]

    def _by_resolution(self, maps: Sequence[Cut], vector: Cut) -> list[Cut]:
        """The last cut of each resolution that is outermost; of tokens, the ends of four blocks."""
        groups: list[list[Cut]] = []
        for _, group in groupby(maps, key=lambda cut: cut.resolution[1]):
            same_size = list(group)
            runs = [list(run) for _, run in groupby(same_size, key=lambda cut: cut.resolution[0])]
            groups += runs if len(runs) == 2 else [same_size]  # more: channels go to the end and back in every block
        tokens = [group for group in groups if group[0].resolution[0] is Tokens]
        chosen: list[Cut] = []
        for group in groups:
            candidates = self._computed(group, vector)
            if len(tokens) == 1 and group is tokens[0] and (row := self._blocks(candidates)):
                chosen += shortened(row)
            elif candidates:
                outermost = min(map(self._level, candidates))
                chosen.append([cut for cut in candidates if self._level(cut) == outermost][-1])
        return chosen

    def _computed(self, group: list[Cut], vector: Cut) -> list[Cut]:
        """The cuts whose maps were computed by weights at their own resolution. If there are none, all cuts that have
        weights on both sides, so that they are neither the image nor pooled for the classifier."""
        before = max((cut.index for cut in self.cuts if cut.index < group[0].index), default=0)
        if there := [cut for cut in group if any(before < index <= cut.index for index in self.weighted)]:
            return there
        between = any(group[-1].index < index <= vector.index for index in self.weighted)
        pooled = between and self.weighted[0] < group[0].index and group[0].resolution[0] is not Tokens
        return group if pooled else []

    def _level(self, cut: Cut) -> int:
        """In how many submodules a cut lies. A Sequential that the forward calls counts as a part of the forward."""
        inner = cut.opened[len(self.outside) :]
        return len(inner) - bool(inner and is_chain(self.network.get_submodule(inner[0])))

    def _blocks(self, row: Sequence[Cut]) -> list[Cut]:
        """The cuts at which submodules of one class end: the class that ends at most of them."""
        modules = dict(self.network.named_modules())
        kinds = [{type(modules[path]) for path in cut.closed if path in modules} for cut in row]
        commonest = Counter(kind for ending in kinds for kind in ending).most_common(1)
        if not commonest or commonest[0][1] < LONGEST_ROW:
            return []
        return [cut for cut, ending in zip(row, kinds) if commonest[0][0] in ending]


def shortened(row: list[Cut]) -> list[Cut]:
    """The row, or the ends of its quarters if it is longer than that."""
    if len(row) <= LONGEST_ROW:
        return row
    return [row[len(row) * quarter // LONGEST_ROW - 1] for quarter in range(1, LONGEST_ROW + 1)]


def is_chain(module: nn.Module) -> bool:
    """Whether it does nothing but call its parts one after another."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _touches(cut: Cut, name: str) -> bool:
    """Whether a cut lies within the submodule called `name`, or at its end."""
    return any(f"{path}.".startswith(f"{name}.") for path in (*cut.opened, *cut.closed))
