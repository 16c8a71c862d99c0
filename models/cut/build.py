"""A network of any kind as a `StagedModel`: cut automatically, or as told and then tried out before it is used."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import compress

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

from models.cut.ends import Ends
from models.cut.given import BEFORE, Stages, given_pieces
from models.cut.trace import Place, PlaceTracer, cut_points, logits_of, record_shapes, slices
from models.cut.view import Piece, StagedView, compiled, find_layout, prefix_tokens
from models.staged import StagedModel, copied, copy_in_mode
from utils.errors import UserError, doing, exhausted_memory, explain
from utils.files import warn_once

MODES = {False: "evaluation mode", True: "training mode"}
# How far logits may be off, as a share of the largest. BatchNorm over a handful of images magnifies rounding.
TOLERANCES = {False: 1e-5, True: 1e-3}
TRIED = 4  # linear layers, of which one may be the classifier


def wrap_module(
    module: nn.Module, num_classes: int | None, image_size: tuple[int, int], stages: Stages | None = None
) -> StagedModel:
    """A view of `module` that knows its stages. The module itself stays as it is.

    Where torch.fx can follow its forward, it is cut where one tensor is all that the rest needs, a torchvision ResNet
    at its layers. Otherwise there are two stages, body and classifier, or the network is one piece. For these, and for
    `stages`, random images prove on a copy that the stages do what the module's own forward does, in evaluation and in
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
    view = cut(module, num_classes, image_size, stages)
    check_logits(view, image_size)
    return view


def cut(module: nn.Module, num_classes: int | None, image_size: tuple[int, int], stages: Stages | None) -> StagedView:
    """`wrap_module` without the look at a single image."""
    if stages is not None:
        trial = Trial(module, num_classes, image_size)
        try:
            return trial.view(given_pieces(module, stages))
        except UserError as error:
            raise UserError(f"stages: {error}") from error
    try:
        with _same_draws():
            return followed(module, num_classes, image_size)
    except Exception as error:  # torch.fx runs code that is not ours on placeholders
        if exhausted_memory(error):
            raise
        uncut = f"torch.fx cannot follow its forward ({explain(error)})"
    return Trial(module, num_classes, image_size).body_and_classifier(uncut)


def check_logits(view: StagedView, image_size: tuple[int, int]) -> None:
    """Say so if the outputs for a single image are probabilities.

    Raises:
        UserError: they are not one row.
    """
    with doing("running it on one image"), _same_draws(), torch.no_grad():
        logits = copy_in_mode(view)(torch.randn(1, 3, *image_size))
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if not (isinstance(logits, Tensor) and logits.dim() == 2):
        raise UserError(f"gives {shape} for a single image, not a row of logits; does a squeeze() remove the batch?")
    if (logits >= 0).all() and (logits.sum() - 1).abs() < 1e-4:
        name = type(view.network).__name__
        warn_once(f"network {name}: its outputs are probabilities, expected logits; leave the softmax at its end out")


def followed(module: nn.Module, num_classes: int | None, image_size: tuple[int, int]) -> StagedView:
    """The view of a network that torch.fx can follow. Its stages are the forward's own operations, so they are exact.

    The forward is followed twice: into all submodules, to choose the ends of the stages, and then into those only that
    an end lies within. All others are called as they are, with what they decide when they are called.

    Raises:
        Exception: torch.fx cannot follow it, or it does not give logits ``[B, num_classes]``.
    """
    network = copy_in_mode(module)  # what a forward stores in a network may be placeholders
    images = torch.randn(2, 3, *image_size)
    graph = PlaceTracer().trace(network)
    record_shapes(network, graph, images[:1])
    ends = Ends(network, graph, image_size).find()
    opened = {"", *(path for end in ends for path in end.opened)}
    graphs = _graphs(network, opened)
    record_shapes(network.eval(), graphs[False], images[:1])
    nodes = [{mode: _end_at(end.place, graph) for mode, graph in graphs.items()} for end in ends]
    # A submodule may hand the end of a stage on within a list, or do something else in training mode.
    same = [
        all(found.values()) and found[False].meta.get("shape") == end.node.meta["shape"]
        for end, found in zip(ends, nodes)
    ]
    if not same[-1]:
        raise TraceError("it gives the vector before the classifier in one mode only")
    places = [end.place for end in compress(ends, same)]
    view, logits = staged_view(module, module, _pieces(network, graphs, places), images)
    if {found.shape for found in logits.values()} != {(len(images), num_classes or logits[False].shape[-1])}:
        raise TraceError("it gives other logits than were asked for")

    def follow(network: nn.Module) -> dict[bool, list[Piece]]:
        with _same_draws():
            return _pieces(network, _graphs(copy_in_mode(network), opened), places)

    view.follow_changes(opened, follow)
    return view


def _graphs(network: nn.Module, opened: Collection[str]) -> dict[bool, fx.Graph]:
    return {mode: PlaceTracer(opened).trace(network.train(mode)) for mode in MODES}


def _pieces(network: nn.Module, graphs: Mapping[bool, fx.Graph], places: Sequence[Place]) -> dict[bool, list[Piece]]:
    """The graphs of both modes, cut behind the calls at `places`."""
    pieces = {}
    for mode, graph in graphs.items():
        ends = [_end_at(place, graph) for place in places]
        if None in ends:
            raise TraceError("a stage does not end where it did before")
        pieces[mode] = [compiled(network, piece) for piece in slices(graph, ends)]
    return pieces


def _end_at(place: Place, graph: fx.Graph) -> fx.Node | None:
    """The last node of the call at `place`, if `graph` can be cut there."""
    nodes = [node for node in graph.nodes if node.meta["place"][: len(place)] == place]
    return nodes[-1] if nodes and nodes[-1] in cut_points(graph) else None


def staged_view(
    module: nn.Module,
    trial: nn.Module,
    pieces: Mapping[bool, Sequence[Piece]],
    images: Tensor,
    uncut: str = "",
) -> tuple[StagedView, dict[bool, Tensor]]:
    """`module` with the stages that `pieces` do in evaluation and in training mode, and their logits in each.

    Args:
        trial: the network on copies of which the stages are run.

    Raises:
        UserError: a stage fails, or a feature is no map and no vector.
    """
    overwriting: set[int] = set()
    logits = {}
    for mode in MODES:
        with _same_draws(), torch.set_grad_enabled(mode):
            *features, logits[mode] = run_pieces(copy_in_mode(trial, mode), pieces[mode], images, overwriting)
    with doing("looking at the features"):
        layouts = [find_layout(f.shape[1:], images.shape[2:], prefix_tokens(module)) for f in features]
    one_piece = len(features) == 1 and features[0] is logits[True]
    if not uncut and all(feature.dim() == 2 for feature in features):
        uncut = "nowhere in its forward is one map all that the rest needs"
    return StagedView(module, pieces, layouts, overwriting, uncut, one_piece), logits


def run_pieces(network: nn.Module, pieces: Sequence[Piece], images: Tensor, overwriting: set[int]) -> list[Tensor]:
    """What each stage gives; adds to `overwriting` the numbers of those that overwrite what they are handed."""
    outputs = [images.clone()]
    for number, piece in enumerate(pieces):
        x = outputs[-1]
        with doing(f"stage {number} on {tuple(x.shape)}"):
            version = x._version
            outputs.append(piece.run(network, x))
            if x._version != version:
                overwriting.add(number)
            if not isinstance(outputs[-1], Tensor):
                raise TypeError(f"it gives a {type(outputs[-1]).__name__}, not a tensor")
    if outputs[-2].dim() != 2:
        raise UserError(
            f"the last feature, before the classifier, must be a vector and has shape {tuple(outputs[-2].shape[1:])}; "
            "pool or flatten it at the end of the stage before the last"
        )
    return outputs[1:]


class Trial:
    """Proves stages on random images and a copy of a network, which has no weights of zero.

    Raises:
        UserError: the network cannot be copied, or does not turn the images into logits ``[B, num_classes]``.
    """

    def __init__(self, network: nn.Module, num_classes: int | None, image_size: tuple[int, int]):
        noise = torch.Generator().manual_seed(0)
        self.network = network
        with doing("copying it"):
            self.copy = copied(network)
        _fill_zeros(self.copy, noise)
        self.images = torch.randn(2, 3, *image_size, generator=noise)
        self.logits = {mode: self._own_logits(mode, num_classes) for mode in MODES}

    def body_and_classifier(self, uncut: str) -> StagedView:
        """Two stages, the classifier and all before it; or the network is one piece."""
        linear = [path for path, part in self.network.named_modules() if isinstance(part, nn.Linear)]
        for head in reversed(linear[-TRIED:]):
            with suppress(UserError):
                return self.view(given_pieces(self.network, [[f"{BEFORE}{head}"], [head]]), uncut)
        whole = Piece(lambda network, x: logits_of(network(x)), frozenset(self.network.state_dict()))
        return self.view([whole, Piece(lambda network, x: x, frozenset())], uncut)

    def view(self, pieces: Sequence[Piece], uncut: str = "") -> StagedView:
        """The network with these stages.

        Raises:
            UserError: they do not reproduce the logits of the network's own forward, or train what it does not.
        """
        view, logits = staged_view(self.network, self.copy, dict.fromkeys(MODES, pieces), self.images, uncut)
        for mode, own in self.logits.items():
            scale, found = own.abs().max(), logits[mode]
            gap = (found - own).abs().max() if found.shape == own.shape else torch.inf
            if not gap <= TOLERANCES[mode] * scale:  # nor if either is NaN
                raise UserError(
                    f"they do not do what the network's own forward does: in {MODES[mode]} logits differ by up to "
                    f"{gap:.2g}, where the largest is {scale:.2g}; is a step missing or out of order?"
                )
        own = self._trained(self.logits[True])
        if own and (others := self._trained(logits[True]) - own):
            raise UserError(
                f"they train {', '.join(sorted(others)[:3])}, to which the network's own forward gives no gradient "
                "(torch.no_grad or detach there); requires_grad=False keeps a part as it is"
            )
        return view

    def _own_logits(self, mode: bool, num_classes: int | None) -> Tensor:
        size = "x".join(map(str, self.images.shape[2:]))
        with doing(f"running it on images of {size} in {MODES[mode]}"), _same_draws(), torch.set_grad_enabled(mode):
            logits = logits_of(copy_in_mode(self.copy, mode)(self.images.clone()))
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        if len(shape) != 2 or shape != (len(self.images), num_classes or shape[1]):
            expected = (len(self.images), num_classes or "classes")
            raise UserError(
                f"gives {shape} for {len(self.images)} images in {MODES[mode]}, not logits of {expected}; let its "
                "forward, or that of a module around it, return the logits alone or as `logits`"
            )
        return logits

    def _trained(self, logits: Tensor) -> set[str]:
        """Names of the parameters that get a gradient from the logits; none if that fails."""
        parameters = {name: p for name, p in self.copy.named_parameters() if p.requires_grad}
        try:
            gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
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
    """Within, every run draws the same random numbers, and the global generators stay as they were.

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
