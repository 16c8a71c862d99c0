"""The order in which the forward of a module calls its parts, and the operations between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.wrapping.probe import Probe
from models.wrapping.wrapped import BEFORE, OPERATIONS, WrappedModel, find_part, listed, only_tensor, part_names
from utils.errors import UserError

# What may stand between two parts. Pooling comes before flattening, which does the same to a 1x1 map but would not do
# for larger images.
_NAMES = ("relu", "pool", "flatten", "token")
BRIDGES = [(), *product(_NAMES), *product(_NAMES, repeat=2)]
TOLERANCE = 1e-5  # of the largest number in a tensor: so much may rounding change


class Call(NamedTuple):
    """One call of a part: its path, what went in and what came out; None where that was not a single tensor."""

    path: str
    input: Tensor | None
    output: Tensor | None


def find_steps(probe: Probe) -> tuple[list[str], str]:
    """The module's parts and the operations between them, in the order in which its forward runs them.

    If there is a single part, those within it, and so on. Where the forward does something else between two parts, the
    steps begin after that, and the text says what is in the way.

    Raises:
        UserError: the forward does something else after its last part.
    """
    owner, start, end = "", probe.images, probe.logits["evaluation"]
    before: list[str] = []
    after: list[str] = []
    while True:
        calls = record(probe, list(_callable_parts(probe.module, owner)))
        try:
            steps, reason = _connect(probe, calls, start, end)
        except UserError:
            if before or after:  # the part as a whole is a step among others
                return [*before, owner, *after], ""
            raise
        if reason:  # the first step includes what comes before it
            return [*steps, *after], reason
        if len(calls) != 1 or not part_names(find_part(probe.module, calls[0].path)):
            return [*before, *steps, *after], ""
        owner, start, end = calls[0]
        place = steps.index(owner)
        before, after = [*before, *steps[:place]], [*steps[place + 1 :], *after]


def opened_by_calls(probe: Probe, step: str) -> list[str]:
    """The parts of a part and the operations between them in its stead; the step as it is where that is not all."""
    part = part_of(probe.module, step)
    if part is None or not part_names(part):
        return [step]
    (call,) = record(probe, [step])[:1] or [None]
    inner = record(probe, list(_callable_parts(probe.module, step)))
    if call is None or call.input is None or call.output is None:
        return [step]
    with suppress(UserError):
        steps, reason = _connect(probe, inner, call.input, call.output)
        if steps and not reason:
            return steps
    return [step]


def _callable_parts(module: nn.Module, owner: str) -> Iterator[str]:
    """Paths of the parts of the part at `owner` that can be called: for a list of parts, its items."""
    for name in part_names(find_part(module, owner)):
        path = f"{owner}.{name}" if owner else name
        is_list = isinstance(find_part(module, path), nn.ModuleList | nn.ModuleDict)
        yield from _callable_parts(module, path) if is_list else [path]


def record(probe: Probe, paths: Sequence[str]) -> list[Call]:
    """Calls of the parts at `paths` in evaluation mode, without those that one of these parts makes itself."""
    calls: list[Call] = []
    running: list[str] = []

    def before(path: str, _: nn.Module, arguments: tuple, options: dict) -> None:
        if not running:
            calls.append(Call(path, _copy_of_only_tensor(*arguments, *options.values()), None))
        running.append(path)

    def after(_: nn.Module, arguments: tuple, output: object) -> None:
        running.pop()
        if not running:
            calls[-1] = calls[-1]._replace(output=_copy_of_only_tensor(output))

    module = probe.fresh_copy("evaluation")
    for part, path in {find_part(module, path): path for path in reversed(paths)}.items():  # one name for each part
        part.register_forward_pre_hook(partial(before, path), with_kwargs=True)
        part.register_forward_hook(after)
    probe.run(module)
    return calls


def _copy_of_only_tensor(*values: object) -> Tensor | None:
    """A copy, because it may be overwritten later."""
    value = only_tensor(*values)
    return None if value is None else value.clone()


@torch.no_grad()
def _connect(probe: Probe, calls: Sequence[Call], start: Tensor, end: Tensor) -> tuple[list[str], str]:
    """`calls` and the operations that lead from `start` to the first, from each to the next, and to `end`.

    What comes before the last gap that no operations fill is left to a step ``before <path>``; the text says what
    it is.

    Raises:
        UserError: the gap is at the end.
    """
    run_step = WrappedModel(probe.fresh_copy("evaluation"), []).step
    steps: list[str] = []
    reason = ""
    x, last = start, None
    for call in [*calls, Call("", end, None)]:
        bridge = _bridge(run_step, x, call.input)
        if bridge is None:
            reason = _gap(last, call.path) if x is not None or not reason else reason
            if not call.path:
                raise UserError(reason)
            steps, bridge = [f"{BEFORE}{call.path}"], ()
        steps += [*bridge, call.path]
        x, last = (None if call.input is None else call.output), call.path
    return steps[:-1], reason


def _gap(last: str | None, path: str) -> str:
    ends = [repr(name) for name in (last, path) if name]
    place = f"between {' and '.join(ends)}" if len(ends) == 2 else f"{'after' if last else 'before'} {ends[0]}"
    return (
        f"{place} its forward does what stages cannot express, such as a skip connection or a function other "
        f"than {listed(OPERATIONS)}; put it, with all that a connection skips, into a submodule of its own"
    )


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


def part_of(module: nn.Module, step: str) -> nn.Module | None:
    """The part that a step runs; None if it is an operation, and no part has its name, or what comes before a part."""
    if step.startswith(BEFORE):
        return None
    return None if step in OPERATIONS and step not in part_names(module) else find_part(module, step)
