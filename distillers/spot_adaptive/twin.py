"""A second face of a network: the same weights, frozen and in evaluation mode."""

from __future__ import annotations

import copy

from torch import nn


def frozen_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its storage but needs no gradients and always evaluates.

    The twin follows every in-place change of the original's parameters and running statistics, so one network
    can be trained and, within the same step, be run with running statistics and without weight gradients,
    and no mode is ever toggled. Call `tie` again after anything that replaces tensors instead of writing into them.
    """
    twin = copy.deepcopy(model).requires_grad_(False).eval()
    tie(twin, model)
    return twin


def tie(twin: nn.Module, model: nn.Module) -> None:
    """Make `twin` (a structural copy of `model`) share the parameters and buffers of `model`."""
    for copied, original in zip(twin.modules(), model.modules()):
        for name, parameter in original.named_parameters(recurse=False):
            setattr(copied, name, nn.Parameter(parameter.detach(), requires_grad=False))
        for name, buffer in original.named_buffers(recurse=False):
            setattr(copied, name, buffer)
