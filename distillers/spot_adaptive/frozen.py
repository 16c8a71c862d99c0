"""Frozen networks: a frozen copy of the student, and layers that keep only what the gradient of their input needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.cut.view import StagedView
from models.staged import constants, copied


def frozen_twin(model: nn.Module) -> nn.Module:
    """A copy of `model` that shares its tensors, needs no gradients and always evaluates.

    The twin follows every in-place change of the original's parameters and running statistics. So within one step the
    network is trained, and is run with running statistics and without weight gradients; its mode is never switched.
    Make another one after anything that replaces tensors instead of writing into them.
    """
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copied(model, shared).eval()


def follow_numbers(twin: nn.Module, model: nn.Module) -> None:
    """Let the twin take over the numbers among the attributes of `model`, which a schedule may have changed.

    It stays the same twin, whose tensors a captured step may read.
    """
    for own, other in zip(twin.modules(), model.modules()):
        vars(own).update(constants(other))
        if isinstance(other, StagedView):
            own.take_stages_of(other)


class InputGradientsOnly(TorchFunctionMode):
    """Context in which convolutions and evaluated BatchNorms of frozen networks keep no activations.

    PyTorch saves the input of both for the gradient of their weights, even if nobody asks for that. Without these
    inputs a residual block keeps two maps instead of four, and a normalisation is one multiply-add. The numbers are the
    same. Layers that are being trained are left alone. So are normalisations in half precision on a CPU, whose native
    form computes in float32 inside.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None:
            return replacement(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


class _FrozenConv2d(torch.autograd.Function):
    """`F.conv2d` whose weight and bias take no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.geometry = (stride, padding, dilation, False, (0, 0), groups)
        ctx.input_layout = (x.shape, x.stride())
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        # The kernel reads nothing of the input but its layout, so any tensor of the same layout will do.
        stand_in = gradient
        if (gradient.shape, gradient.stride()) != ctx.input_layout:
            stand_in = gradient.new_empty_strided(*ctx.input_layout)
        weight = weight.to(gradient.dtype)  # autocast ran the convolution in the gradient's type
        wanted = (True, False, False)
        operands = (gradient, stand_in, weight, None)
        of_input, _, _ = torch.ops.aten.convolution_backward(*operands, *ctx.geometry, wanted)
        return of_input, None, None, None, None, None, None


def _conv2d(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    if weight.requires_grad or isinstance(padding, str) or not (torch.is_grad_enabled() and x.requires_grad):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    geometry = (_pair(stride), _pair(padding), _pair(dilation), groups)
    return _FrozenConv2d.apply(x, weight, bias, *geometry)


class _FrozenBatchNorm(torch.autograd.Function):
    """`F.batch_norm` in evaluation whose weight and bias take no gradient: one kernel, and no activation is kept."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps):
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, gradient):
        mean, var, weight = ctx.saved_tensors
        # Only the gradients of weight and bias depend on the input, and an evaluation has no statistics of a batch.
        none = gradient.new_empty(0)
        operands = (gradient, gradient, weight, mean, var, none, none)
        of_input, _, _ = torch.ops.aten.native_batch_norm_backward(*operands, False, ctx.eps, (True, False, False))
        return of_input, None, None, None, None, None


def _batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    frozen = not training and weight is not None and bias is not None and not weight.requires_grad
    frozen = frozen and torch.is_grad_enabled() and x.requires_grad
    if frozen and x.is_cuda:  # where every kernel is a launch
        return _FrozenBatchNorm.apply(x, running_mean, running_var, weight, bias, eps)
    if not (frozen and x.dtype == weight.dtype):
        return F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    scale = weight * torch.rsqrt(running_var + eps)
    shift = torch.addcmul(bias, running_mean, scale, value=-1)
    shape = (-1, *[1] * (x.dim() - 2))
    return torch.addcmul(shift.view(shape), x, scale.view(shape))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


_REPLACEMENTS: dict[Callable, Callable] = {F.conv2d: _conv2d, F.batch_norm: _batch_norm}
