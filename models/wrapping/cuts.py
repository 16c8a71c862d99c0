"""Finding the stages of a module, from the order in which its forward calls its parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.wrapping.probe import Probe
from models.wrapping.wrapped import OPERATIONS, Cuts, WrappedModel, find_part, listed, part_names
from utils.errors import UserError

TORCHVISION_RESNET = [
    ["conv1", "bn1", "relu", "maxpool"],
    ["layer1"],
    ["layer2"],
    ["layer3"],
    ["layer4"],
    ["avgpool", "flatten"],
    ["fc"],
]

# What may stand between two parts. Pooling comes before flattening, which does the same to a 1x1 map but would not do
# for larger images.
_NAMES = ("relu", "pool", "flatten")
BRIDGES = [(), *product(_NAMES), *product(_NAMES, repeat=2)]
# Parts that belong with the operations between the last map and the classifier.
POOLING = (
    nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.AdaptiveMaxPool2d | nn.Flatten | nn.Dropout | nn.Identity
)
TOLERANCE = 1e-5  # of the largest number in a tensor: so much may rounding change


class Call(NamedTuple):
    """One call of a part: its path, what went in and what came out; None where that was not a single tensor."""

    path: str
    input: Tensor | None
    output: Tensor | None


def find_cuts(probe: Probe) -> Cuts:
    """Stages that provably do what the module does.

    A torchvision ResNet is cut at its layers, any other module where the resolution changes.

    Raises:
        UserError: there are none; the line says what the forward does that stages cannot express.
    """
    module = probe.module
    if part_names(module) == [name for stage in TORCHVISION_RESNET for name in stage if name != "flatten"]:
        with suppress(UserError):
            probe.check(TORCHVISION_RESNET)
            return TORCHVISION_RESNET
    steps = find_steps(probe)
    try:
        return _cut(probe, steps)
    except UserError:  # the classifier may begin with pooling
        return _cut(probe, [inner for step in steps for inner in _opened(module, step)])


def _cut(probe: Probe, steps: Sequence[str]) -> Cuts:
    """Stages of `steps` that end where the resolution changes.

    Raises:
        UserError: they are not good as stages.
    """
    module = probe.module
    # The classifier: the last part that has weights, and whatever comes after it.
    head = max((place for place, step in enumerate(steps) if _has_weights(_part(module, step))), default=0)
    body = [inner for step in steps[:head] for inner in _opened(module, step)]
    bridge: list[str] = []
    while body and isinstance(_part(module, body[-1]), POOLING | None):
        bridge.insert(0, body.pop())
    cuts = [*probe.by_resolution(body), *([bridge] if bridge else []), steps[head:]]
    try:
        probe.check(cuts)
    except UserError as error:
        raise UserError(f"cannot be cut into stages automatically: {error}") from error
    return cuts


def spelt(cuts: Cuts) -> str:
    """`cuts` as one writes them in a config."""
    # What begins with a digit would be read as a number.
    stages = [", ".join(f"'{step}'" if step[0].isdigit() else step for step in stage) for stage in cuts]
    return f"[[{'], ['.join(stages)}]]"


def find_steps(probe: Probe) -> list[str]:
    """The module's parts and the operations between them, in the order in which its forward runs them.

    If there is a single part, those within it, and so on.

    Raises:
        UserError: the forward does something else between two parts.
    """
    owner, start, end = "", probe.images, probe.logits["evaluation"]
    before: list[str] = []
    after: list[str] = []
    steps: list[str] = []
    while True:
        calls = _record(probe, list(_callable_parts(probe.module, owner)))
        try:
            steps = _connect(probe, calls, start, end)
        except UserError:
            if before or after:  # the part as a whole is a step among others
                return [*before, owner, *after]
            raise
        if len(calls) != 1 or not part_names(find_part(probe.module, calls[0].path)):
            return [*before, *steps, *after]
        owner, start, end = calls[0]
        place = steps.index(owner)
        before, after = [*before, *steps[:place]], [*steps[place + 1 :], *after]


def _has_weights(part: nn.Module | None) -> bool:
    return part is not None and any(True for _ in part.parameters())


def _opened(module: nn.Module, step: str) -> list[str]:
    """The parts of a Sequential in its stead; any other step as it is."""
    part = _part(module, step)
    is_chain = isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward
    return [f"{step}.{name}" for name in part_names(part)] if is_chain else [step]


def _callable_parts(module: nn.Module, owner: str) -> Iterator[str]:
    """Paths of the parts of the part at `owner` that can be called: for a list of parts, its items."""
    for name in part_names(find_part(module, owner)):
        path = f"{owner}.{name}" if owner else name
        is_list = isinstance(find_part(module, path), nn.ModuleList | nn.ModuleDict)
        yield from _callable_parts(module, path) if is_list else [path]


def _record(probe: Probe, paths: Sequence[str]) -> list[Call]:
    """Calls of the parts at `paths` in evaluation mode, without those that one of these parts makes itself."""
    calls: list[Call] = []
    running: list[str] = []

    def before(path: str, _: nn.Module, arguments: tuple, options: dict) -> None:
        if not running:
            calls.append(Call(path, _only_tensor(*arguments, *options.values()), None))
        running.append(path)

    def after(_: nn.Module, arguments: tuple, output: object) -> None:
        running.pop()
        if not running:
            calls[-1] = calls[-1]._replace(output=_only_tensor(output))

    module = probe.fresh_copy("evaluation")
    for part, path in {find_part(module, path): path for path in reversed(paths)}.items():  # one name for each part
        part.register_forward_pre_hook(partial(before, path), with_kwargs=True)
        part.register_forward_hook(after)
    probe.run(module)
    return calls


def _only_tensor(*values: object) -> Tensor | None:
    """A copy, because it may be overwritten later."""
    return values[0].clone() if len(values) == 1 and isinstance(values[0], Tensor) else None


@torch.no_grad()
def _connect(probe: Probe, calls: Sequence[Call], start: Tensor, end: Tensor) -> list[str]:
    """`calls` and the operations that lead from `start` to the first, from each to the next, and to `end`."""
    run_step = WrappedModel(probe.fresh_copy("evaluation"), []).step
    steps: list[str] = []
    x, last = start, None
    for call in [*calls, Call("", end, None)]:
        bridge = _bridge(run_step, x, call.input)
        if bridge is None:
            ends = [repr(name) for name in (last, call.path) if name]
            place = f"between {' and '.join(ends)}" if len(ends) == 2 else f"{'after' if last else 'before'} {ends[0]}"
            raise UserError(
                f"{place} its forward does what stages cannot express, such as a skip connection or a function other "
                f"than {listed(OPERATIONS)}; put it, with all that a connection skips, into a submodule of its own"
            )
        steps += [*bridge, call.path]
        x, last = call.output, call.path
    return steps[:-1]


def _bridge(
    step: Callable[[str], Callable[[Tensor], Tensor]], x: Tensor | None, target: Tensor | None
) -> Sequence[str] | None:
    """The operations that make `target` of `x`; None if they do not exist."""
    if x is None or target is None:
        return None
    for names in BRIDGES:
        out = x
        with suppress(Exception):  # not every operation takes every tensor
            for name in names:
                out = step(name)(out)
            if out.shape == target.shape and (out - target).abs().max() <= TOLERANCE * target.abs().max():
                return names
    return None


def _part(module: nn.Module, step: str) -> nn.Module | None:
    """The part that a step runs; None if it is an operation, and no part has its name."""
    return None if step in OPERATIONS and step not in part_names(module) else find_part(module, step)
