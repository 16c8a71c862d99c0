"""Proving that stages compute what the module itself computes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor, nn

from models.staged import Stage
from models.wrapping.wrapped import Cuts, WrappedModel, explain, listed
from utils.errors import UserError

# How far logits may be off, as a share of the largest. BatchNorm over a handful of images magnifies rounding.
TOLERANCES = {"evaluation": 1e-5, "training": 1e-3}
HINTS = {
    "evaluation": "is a step missing or out of order?",
    "training": "is a dropout called as a function? Make it a part of the network (nn.Dropout)",
}


class Probe:
    """A few random images and the logits that a module makes of them, to try cuts on.

    Every run is on a fresh copy and under a random state of its own, so the module keeps its running statistics
    and its mode, and nothing that is drawn later changes. Training mode is tried as well: only there does
    a dropout show that the module's forward calls as a function.

    Raises:
        UserError: the module cannot be copied, or does not turn the images into logits ``[B, num_classes]``.
    """

    def __init__(self, module: nn.Module, num_classes: int | None, image_size: tuple[int, int]):
        noise = torch.Generator().manual_seed(0)
        self.image_size = image_size
        try:
            self.module = copy.deepcopy(module)
            _fill_zeros(self.module, noise)
        except Exception as error:
            raise UserError(f"cannot be copied, as distilling it needs: {explain(error)}") from error
        self.images = torch.randn(4, 3, *image_size, generator=noise)
        self.logits = {mode: self._own_logits(mode, num_classes) for mode in TOLERANCES}

    def check(self, cuts: Cuts) -> None:
        """Raise a UserError that says what is wrong, unless `cuts` reproduce the module's own logits."""
        if len(cuts) < 2 or not all(cuts):
            lengths = ", ".join(str(len(stage)) for stage in cuts) or "none"
            raise UserError(f"two or more are needed, each of one or more steps; found with steps: {lengths}")
        for mode, tolerance in TOLERANCES.items():
            own, staged = self.logits[mode], self._staged_logits(mode, cuts)
            if staged.shape != own.shape:
                shapes = f"{tuple(staged.shape)}, the network's own forward {tuple(own.shape)}"
                raise UserError(f"the last one gives a tensor of shape {shapes}")
            gap, scale = (staged - own).abs().max(), own.abs().max()
            if not gap <= tolerance * scale:  # nor if either is NaN
                raise UserError(
                    f"they do not do what the network's own forward does: in {mode} mode logits differ by up to "
                    f"{gap:.2g}, where the largest is {scale:.2g}; {HINTS[mode]}"
                )
        if not self._trained_by_itself:  # nothing to compare with
            return
        module = self.fresh_copy("training")
        if others := self._trained(module, WrappedModel(module, cuts).run) - self._trained_by_itself:
            raise UserError(
                f"they train {listed(sorted(others)[:3])}, to which the network's own forward gives no gradient "
                "(torch.no_grad or detach there); requires_grad=False keeps a part as it is"
            )

    @torch.no_grad()
    def shapes(self, cuts: Cuts) -> list[tuple[int, ...]]:
        """Shape of every feature as the module itself has it, without the batch dimension."""
        with _own_random_state():
            features, _ = WrappedModel(self.fresh_copy("evaluation"), cuts).features(self.images.clone())
        return [tuple(feature.shape[1:]) for feature in features]

    def fresh_copy(self, mode: str) -> nn.Module:
        """A copy of the module, in ``"evaluation"`` or ``"training"`` mode."""
        return copy.deepcopy(self.module).train(mode == "training")

    @torch.no_grad()
    def run(self, module: nn.Module) -> object:
        """What `module` makes of the images."""
        with _own_random_state():
            return module(self.images.clone())

    @torch.no_grad()
    def by_resolution(self, names: Sequence[str]) -> list[list[str]]:
        """Chained parts, a new group wherever the size of the map changes; a 1x1 map counts as a vector."""
        groups, size, x = [], None, self.images.clone()
        with _own_random_state():
            for name, step in zip(names, self._stages("evaluation", [names])[0]):
                x = _run_step(name, step, x)
                new_size = tuple(x.shape[2:]) if x.shape[2:].numel() > 1 else ()
                if new_size != size:
                    groups.append([])
                groups[-1].append(name)
                size = new_size
        return groups

    @torch.no_grad()
    def _own_logits(self, mode: str, num_classes: int | None) -> Tensor:
        try:
            logits = self.run(self.fresh_copy(mode))
        except Exception as error:
            size = "x".join(str(length) for length in self.images.shape[2:])
            raise UserError(f"fails on images of {size} in {mode} mode: {explain(error)}") from error
        if num_classes is None and isinstance(logits, Tensor) and logits.dim() == 2:
            num_classes = logits.shape[1]
        expected = (len(self.images), num_classes)
        if not isinstance(logits, Tensor) or logits.shape != expected:
            found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
            raise UserError(f"gives {found} for {expected[0]} images in {mode} mode, not logits of shape {expected}")
        return logits

    @cached_property
    def _trained_by_itself(self) -> set[str]:
        module = self.fresh_copy("training")
        return self._trained(module, module)

    def _trained(self, module: nn.Module, run: Callable[[Tensor], Tensor]) -> set[str]:
        """Names of the parameters that get a gradient from what `run` makes of two images; none if that fails."""
        parameters = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        try:
            with _own_random_state(), torch.enable_grad():
                logits = run(self.images[:2].clone())
                gradients = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
        except Exception:  # of a network that cannot be trained, as a teacher need not be
            return set()
        return {name for name, gradient in zip(parameters, gradients) if gradient is not None}

    @torch.no_grad()
    def _staged_logits(self, mode: str, cuts: Cuts) -> Tensor:
        x = self.images.clone()
        with _own_random_state():
            for index, (names, stage) in enumerate(zip(cuts, self._stages(mode, cuts))):
                if index == len(cuts) - 1 and x.dim() != 2:
                    raise UserError(
                        f"the last feature, before [{listed(names)}], must be a vector and is a map of shape "
                        f"{tuple(x.shape[1:])}; pool or flatten it at the end of the stage before the last"
                    )
                x = _run_stage(names, stage, x)
        return x

    def _stages(self, mode: str, cuts: Cuts) -> list[Stage]:
        return WrappedModel(self.fresh_copy(mode), cuts).stages()


def _run_stage(names: Sequence[str], stage: Stage, feature: Tensor) -> Tensor:
    x, before = feature, feature.clone()
    for name, step in zip(names, stage):
        x = _run_step(name, step, x)
    if not torch.equal(feature, before):
        raise UserError(
            f"the stage [{listed(names)}] overwrites the feature that it is handed, which a distiller "
            "may still need; do without the in-place operation at its beginning, or let the stage begin elsewhere"
        )
    return x


def _run_step(name: str, step: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    try:
        out = step(x)
    except Exception as error:
        raise UserError(f"{name!r} fails on a tensor of shape {tuple(x.shape)}: {explain(error)}") from error
    if not isinstance(out, Tensor):
        raise UserError(f"{name!r} gives a {type(out).__name__}, and a step must give a tensor")
    return out


@torch.no_grad()
def _fill_zeros(module: nn.Module, generator: torch.Generator) -> None:
    """Noise for weights that start at zero: behind a classifier of zeros every cut would look right."""
    for name, parameter in module.named_parameters():
        if not name.endswith("bias") and not parameter.any():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


@contextmanager
def _own_random_state() -> Iterator[None]:
    """The same draws for every run within, and none of them taken from the global generator.

    That of the CPU only, where modules are built: `torch.manual_seed` would seed the GPUs as well.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
