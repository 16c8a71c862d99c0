"""Differentiating a part of the loss before the rest is computed, so that what it remembers makes room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def differentiated(loss: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """`loss` again, its gradient with respect to `inputs` worked out at once instead of in the backward pass.

    The activations of its graph are freed here. In the backward pass the gradient is handed out as any other, hooks
    included, but only once, and it has no derivative of its own.

    Args:
        loss: a scalar. If it requires no gradient it is handed back as it is.
        inputs: leaves of its graph; what it does not depend on gets no gradient.
    """
    if not loss.requires_grad:
        return loss
    with torch.autocast(loss.device.type, enabled=False):  # or formulas of custom gradients would run in half precision
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
    used = [(gradient, leaf) for gradient, leaf in zip(gradients, inputs) if gradient is not None]
    return with_gradient(loss.detach(), *zip(*used)) if used else loss.detach()


def with_gradient(value: Tensor, gradients: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """A scalar equal to `value` whose derivatives with respect to `inputs` are `gradients`, which it takes over."""
    return _Known.apply(value, list(gradients), *inputs)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, gradients, *inputs):
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    def backward(ctx, factor):
        gradients, ctx.gradients = ctx.gradients, None
        torch._foreach_mul_(gradients, factor.to(gradients[0].dtype))
        return None, None, *gradients
