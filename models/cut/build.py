"""A network of any kind as a `StagedModel`: cut automatically or as told, and tried out before it is used."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import compress

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from models.cut.ends import Ends
from models.cut.given import BEFORE, Stages, given_pieces, listed, only_tensor
from models.cut.layout import Layout, find_layout, prefix_tokens
from models.cut.trace import Place, cut_points, record_shapes, slices, trace
from models.cut.view import Piece, StagedView, compiled
from models.staged import StagedModel
from utils.errors import UserError, doing, exhausted_memory, explain

Pieces = Mapping[bool, Sequence[Piece]]  # of evaluation and of training mode

MODES = {False: "evaluation mode", True: "training mode"}
# How far logits may be off, as a share of the largest. BatchNorm over a handful of images magnifies rounding.
TOLERANCES = {False: 1e-5, True: 1e-3}


def wrap_module(
    module: nn.Module, num_classes: int | None, image_size: tuple[int, int], stages: Stages | None = None
) -> StagedModel:
    """A view of `module` that knows its stages. The module itself stays as it is.

    Where torch.fx can follow its forward, it is cut where one tensor is all that the rest needs, a torchvision ResNet
    at its layers. Otherwise there are two stages, body and classifier, or the network is one piece. Before anything is
    returned, random images prove on a copy that the stages do what the module's own forward does, in evaluation and in
    training mode.

    Args:
        module: a `StagedModel` is returned as it is.
        num_classes: how many logits it has to give; None: as many as it does.
        image_size: height and width of the images.
        stages: the stages to use instead, see `models.cut.given.given_pieces`.

    Raises:
        UserError: in one line, what is wrong with the network or the stages, and what would do.
    """
    if isinstance(module, StagedModel):
        if stages is not None:
            raise UserError("is cut into stages by its own class; leave `stages` out")
        return module
    trial = Trial(module, num_classes, image_size)
    if stages is None:
        return _cut(module, trial)
    pieces = dict.fromkeys(MODES, given_pieces(module, stages))
    try:
        view = trial.view(module, pieces)
        trial.refuse_other_training(pieces[True])
        return view
    except UserError as error:
        raise UserError(f"stages: {error}") from error


def _cut(module: nn.Module, trial: Trial) -> StagedView:
    try:
        with _same_draws():
            pieces = followed(trial.fresh(), trial.images)
        return trial.view(module, pieces)
    except Exception as error:  # torch.fx runs code that is not ours on placeholders
        if exhausted_memory(error):
            raise
        uncut = f"torch.fx cannot follow its forward ({explain(error)})"
    for head in reversed(trial.classifiers()):
        with suppress(UserError):
            pieces = dict.fromkeys(MODES, given_pieces(module, [[f"{BEFORE}{head}"], [head]]))
            return trial.view(module, pieces, uncut)
    whole = [Piece(_forward, frozenset(module.state_dict())), Piece(_same, frozenset())]
    return trial.view(module, dict.fromkeys(MODES, whole), uncut)


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    return network(x)


def _same(network: nn.Module, x: Tensor) -> Tensor:
    return x


def followed(network: nn.Module, images: Tensor) -> Pieces:
    """The stages of a network that torch.fx can follow.

    Its forward is followed twice: into all submodules, to choose the ends of the stages, and then into those only that
    an end lies within. All others are called as they are, with what they decide when they are called.

    Args:
        network: a copy, because what a forward stores in it may be placeholders.

    Raises:
        Exception: torch.fx cannot follow it.
    """
    network.eval()
    graph = trace(network)
    record_shapes(network, graph, images[:1])
    ends = Ends(network, graph, tuple(images.shape[2:])).find()
    opened = {path for end in ends for path in end.opened}
    graphs = {mode: trace(network.train(mode), opened) for mode in MODES}
    record_shapes(network.eval(), graphs[False], images[:1])
    nodes = [{mode: _end_at(end.place, graph) for mode, graph in graphs.items()} for end in ends]
    # A submodule may hand the end of a stage on within a list, or do something else in training mode.
    same = [
        all(found.values()) and found[False].meta.get("shape") == end.node.meta["shape"]
        for end, found in zip(ends, nodes)
    ]
    if not same[-1]:
        raise TraceError("it gives the vector before the classifier in one mode only")
    return {
        mode: [compiled(network, piece) for piece in slices(graph, [found[mode] for found in compress(nodes, same)])]
        for mode, graph in graphs.items()
    }


def _end_at(place: Place, graph: fx.Graph) -> fx.Node | None:
    """The last node of the call at `place`, if `graph` can be cut there."""
    nodes = [node for node in graph.nodes if node.meta["place"][: len(place)] == place]
    return nodes[-1] if nodes and nodes[-1] in cut_points(graph) else None


class Trial:
    """A copy of a network and a few random images, to try stages on.

    Every run draws the same random numbers and leaves the global generators as they were.

    Raises:
        UserError: the network cannot be copied, or does not turn the images into logits ``[B, num_classes]``.
    """

    def __init__(self, network: nn.Module, num_classes: int | None, image_size: tuple[int, int]):
        noise = torch.Generator().manual_seed(0)
        with doing("copying it, which distilling needs,"):
            self.network = copy.deepcopy(network)
        _fill_zeros(self.network, noise)
        self.image_size = image_size
        self.images = torch.randn(2, 3, *image_size, generator=noise)
        self.logits = {mode: self._own_logits(mode, num_classes) for mode in MODES}

    def view(self, network: nn.Module, pieces: Pieces, uncut: str = "") -> StagedView:
        """`network` with these stages.

        Raises:
            UserError: they do not reproduce the network's own logits, or a feature is no map and no vector.
        """
        overwriting: set[int] = set()
        for mode in MODES:
            with _same_draws(), torch.no_grad():
                features, logits = self._run(self.fresh(mode), pieces[mode], overwriting)
            self._compare(logits, mode)
        layouts = [self._layout(number, tuple(feature.shape[1:])) for number, feature in enumerate(features)]
        one_piece = len(features) == 1 and features[0] is logits
        if not uncut and all(feature.dim() == 2 for feature in features):
            uncut = "nowhere in its forward is one map all that the rest needs"
        return StagedView(network, pieces, layouts, overwriting, uncut, one_piece)

    def refuse_other_training(self, pieces: Sequence[Piece]) -> None:
        """Raise a UserError if the stages train what the network's own forward does not.

        Nothing is compared where that trains nothing, as that of a teacher may.
        """
        own = self._trained(lambda network: network(self.images.clone()))
        if own and (others := self._trained(lambda network: self._run(network, pieces, set())[1]) - own):
            raise UserError(
                f"they train {listed(sorted(others)[:3])}, to which the network's own forward gives no gradient "
                "(torch.no_grad or detach there); requires_grad=False keeps a part as it is"
            )

    def classifiers(self) -> list[str]:
        """Submodules that have weights and are called with a vector, in the order of their calls."""
        found, network = [], self.fresh()

        def before(path: str, part: nn.Module, arguments: tuple) -> None:
            given = only_tensor(*arguments)
            if given is not None and given.dim() == 2 and next(part.parameters(), None) is not None:
                found.append(path)

        for path, part in network.named_modules():
            if path and not part._modules:
                part.register_forward_pre_hook(partial(before, path))
        self._own_logits(False, None, network)
        return found

    def fresh(self, mode: bool = False) -> nn.Module:
        """A copy of the network in a mode, since a run may change what it remembers; the parameters are shared."""
        return copy.deepcopy(self.network, {id(tensor): tensor for tensor in self.network.parameters()}).train(mode)

    def _run(self, network: nn.Module, pieces: Sequence[Piece], overwriting: set[int]) -> tuple[list[Tensor], Tensor]:
        """Features and logits; adds to `overwriting` the numbers of the stages that overwrite what they are handed."""
        outputs = [self.images.clone()]
        for number, piece in enumerate(pieces):
            x = outputs[-1]
            if number == len(pieces) - 1 and x.dim() != 2:
                raise UserError(
                    f"the last feature, before the classifier, must be a vector and has shape {tuple(x.shape[1:])}; "
                    "pool or flatten it at the end of the stage before the last"
                )
            version = x._version
            with doing(f"stage {number} on a tensor of shape {tuple(x.shape)}"):
                outputs.append(piece.run(network, x))
            if x._version != version:
                overwriting.add(number)
            if not isinstance(outputs[-1], Tensor):
                raise UserError(f"stage {number} gives a {type(outputs[-1]).__name__}, not a tensor")
        return outputs[1:-1], outputs[-1]

    def _compare(self, logits: Tensor, mode: bool) -> None:
        own = self.logits[mode]
        if logits.shape != own.shape:
            raise UserError(
                f"they give logits of shape {tuple(logits.shape)}, the network's own forward {tuple(own.shape)}"
            )
        gap, scale = (logits - own).abs().max(), own.abs().max()
        if not gap <= TOLERANCES[mode] * scale:  # nor if either is NaN
            raise UserError(
                f"they do not do what the network's own forward does: in {MODES[mode]} logits differ by up to "
                f"{gap:.2g}, where the largest is {scale:.2g}; is a step missing or out of order?"
            )

    def _layout(self, number: int, shape: tuple[int, ...]) -> Layout:
        try:
            return find_layout(shape, self.image_size, prefix_tokens(self.network))
        except ValueError as error:
            raise UserError(f"feature {number} is {error}; let its stage end elsewhere") from error

    @torch.no_grad()
    def _own_logits(self, mode: bool, num_classes: int | None, network: nn.Module | None = None) -> Tensor:
        size = "x".join(map(str, self.image_size))
        with doing(f"running it on images of {size} in {MODES[mode]}"), _same_draws():
            logits = (network or self.fresh(mode))(self.images.clone())
        if num_classes is None and isinstance(logits, Tensor) and logits.dim() == 2:
            num_classes = logits.shape[1]
        expected = (len(self.images), num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(f"gives {found} for {expected[0]} images in {MODES[mode]}, not logits of shape {expected}")
        return logits

    def _trained(self, forward: Callable[[nn.Module], Tensor]) -> set[str]:
        """Names of the parameters that get a gradient from the logits in training mode; none if that fails."""
        network = self.fresh(True)
        parameters = {name: p for name, p in network.named_parameters() if p.requires_grad}
        try:
            with _same_draws(), torch.enable_grad():
                loss = forward(network).sum()
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        except RuntimeError:  # of a network that cannot be trained, as a teacher need not be
            return set()
        return {name for name, gradient in zip(parameters, gradients) if gradient is not None}


@torch.no_grad()
def _fill_zeros(network: nn.Module, generator: torch.Generator) -> None:
    """Noise for weights that start at zero: behind a classifier of zeros every cut would look right."""
    for name, parameter in network.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def _same_draws() -> Iterator[None]:
    """The same random numbers in every run within, and none of them taken from the global generators.

    Of PyTorch's generators that of the CPU only, where networks are built: `torch.manual_seed` would seed the GPUs too.
    """
    state = random.getstate()
    random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        random.setstate(state)
