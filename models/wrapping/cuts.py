"""Finding the stages of a module, from the order in which its forward calls its parts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise

import torch
from torch import nn

from models.wrapping.layout import find_layout
from models.wrapping.probe import Probe
from models.wrapping.steps import find_steps, opened_by_calls, part_of, record
from models.wrapping.wrapped import BEFORE, WHOLE, Cuts, find_part, part_names, prefix_tokens
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

# Parts that belong with the operations between the last map and the classifier.
POOLING = (
    nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.MaxPool2d | nn.AdaptiveMaxPool2d | nn.Flatten | nn.Dropout | nn.Identity
)


def find_cuts(probe: Probe) -> tuple[Cuts, str]:
    """Stages that provably do what the module does, and why there are not more of them, where something is in the way.

    A torchvision ResNet is cut at its layers, a module of timm where timm says that features are, any other module
    where the resolution changes. Where the forward does something between two parts that stages cannot express, all
    before it is one stage. In the last resort there are two, body and classifier, or the module is one piece.
    """
    module = probe.module
    if part_names(module) == [name for stage in TORCHVISION_RESNET for name in stage if name != "flatten"]:
        with suppress(UserError):
            probe.check(TORCHVISION_RESNET)
            return TORCHVISION_RESNET, ""
    try:
        steps, reason = find_steps(probe)
        try:
            return _cut(probe, steps), reason
        except UserError:  # the classifier may begin with pooling
            return _cut(probe, [inner for step in steps for inner in opened_by_calls(probe, step)]), reason
    except UserError as error:
        reason = str(error)
    for head in reversed(_classifiers(probe)):
        with suppress(UserError):
            cuts = [[f"{BEFORE}{head}"], [head]]
            probe.check(cuts)
            return cuts, reason
    return WHOLE, reason


def _cut(probe: Probe, steps: Sequence[str]) -> Cuts:
    """Stages of `steps`, see `find_cuts`.

    Raises:
        UserError: they are not good as stages.
    """
    module = probe.module
    # The classifier: the last part that has weights, and whatever comes after it.
    head = max((place for place, step in enumerate(steps) if _has_weights(part_of(module, step))), default=0)
    body = [inner for step in steps[:head] for inner in _opened(module, step)]
    tail: list[str] = []
    try:
        if ends := _ends_by_timm(module, body):
            groups = [body[start:end] for start, end in pairwise([0, *ends])]
            tail = body[ends[-1] :]
        else:
            while body and isinstance(part_of(module, body[-1]), POOLING | None) and not body[-1].startswith(BEFORE):
                tail.insert(0, body.pop())
            groups = probe.by_resolution(body)
            if len(groups) > 1 and len(groups[0]) == 1 and _starts_at_once(probe, groups[0][0]):
                groups[:2] = [[*groups[0], *groups[1]]]
        cuts = _without_odd_features(probe, [*groups, *([tail] if tail else []), steps[head:]])
        probe.check(cuts)
    except UserError as error:
        raise UserError(f"cannot be cut into stages automatically: {error}") from error
    return cuts


def _ends_by_timm(module: nn.Module, body: Sequence[str]) -> list[int]:
    """Places in `body` after which timm says that there is a feature. Of a row at one resolution, four are taken."""
    info = getattr(module, "feature_info", None)
    if not isinstance(info, list) or not all(isinstance(entry, dict) for entry in info):
        return []
    rows: dict[object, list[int]] = {}
    for entry in info:
        name = entry.get("module")
        if inner := [place for place, step in enumerate(body) if f"{step}.".startswith(f"{name}.")]:
            rows.setdefault(entry.get("reduction"), []).append(inner[-1] + 1)
    places = [place for row in rows.values() for place in (row if len(row) <= 4 else _four_of(row))]
    return sorted(set(places))


def _four_of(row: Sequence[int]) -> list[int]:
    return [row[len(row) * quarter // 4 - 1] for quarter in range(1, 5)]


def _starts_at_once(probe: Probe, step: str) -> bool:
    """Whether nothing that has weights runs before the part that `step` speaks of, so that its input is the image."""
    if not step.startswith(BEFORE):
        return False
    called = record(probe, [path for path, part in probe.module.named_modules() if not part._modules])
    weighty = (call.path for call in called if _has_weights(find_part(probe.module, call.path)))
    return f"{next(weighty, '')}.".startswith(f"{step.removeprefix(BEFORE)}.")


def _without_odd_features(probe: Probe, cuts: Cuts) -> Cuts:
    """`cuts`, where a stage that ends in something that is no feature goes on to the end of the next.

    So does one that ends in a vector before a stage of operations and dropout alone.
    """
    merged: list[list[str]] = [[]]
    prefix = prefix_tokens(probe.module)
    for number, shape in enumerate(probe.shapes(cuts)):
        merged[-1] += cuts[number]
        following = [part_of(probe.module, step) for step in cuts[number + 1]]
        if len(shape) == 1 and number + 2 < len(cuts) and not any(map(_has_weights, following)):
            continue
        with suppress(ValueError):
            find_layout(shape, probe.image_size, prefix)
            merged.append([])
    merged[-1] += cuts[-1]
    return merged


def _classifiers(probe: Probe) -> list[str]:
    """Parts with weights that turn vectors into the very logits of the module."""
    paths = [path for path, part in probe.module.named_modules() if path and not part._modules]
    return [
        call.path
        for call in record(probe, paths)
        if call.input is not None
        and call.input.dim() == 2
        and call.output is not None
        and torch.equal(call.output, probe.logits["evaluation"])
        and _has_weights(find_part(probe.module, call.path))
    ]


def spelt(cuts: Cuts) -> str:
    """`cuts` as one writes them in a config."""
    # What begins with a digit would be read as a number.
    stages = [", ".join(f"'{step}'" if step[0].isdigit() else step for step in stage) for stage in cuts]
    return f"[[{'], ['.join(stages)}]]"


def _has_weights(part: nn.Module | None) -> bool:
    return part is not None and any(True for _ in part.parameters())


def _opened(module: nn.Module, step: str) -> list[str]:
    """The parts of a Sequential in its stead; any other step as it is."""
    part = part_of(module, step)
    is_chain = isinstance(part, nn.Sequential) and type(part).forward is nn.Sequential.forward
    return [f"{step}.{name}" for name in part_names(part)] if is_chain else [step]
