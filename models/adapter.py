"""Adapters: small trainable networks that turn one feature into the shape of another."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.pooling import average_pool


class Resize(nn.Module):
    """Bring a map ``[B, C, *, *]`` to ``[B, C, height, width]``: average pooling down, bilinear interpolation up."""

    def __init__(self, height: int, width: int):
        super().__init__()
        self.size = (height, width)

    def forward(self, x: Tensor) -> Tensor:
        shrinks = x.shape[2] >= self.size[0] and x.shape[3] >= self.size[1]
        if shrinks:
            return average_pool(x, *self.size)
        return F.interpolate(x, self.size, mode="bilinear", align_corners=False)

    def extra_repr(self) -> str:
        return f"{self.size[0]}x{self.size[1]}"


def make_adapter(source: Sequence[int], target: Sequence[int]) -> nn.Sequential:
    """Adapter from features of shape `source` to features of shape `target` (batch dimension left out).

    Two vectors: one linear layer. Two maps: convolution, BatchNorm, ReLU, where the convolution is 3x3 with
    stride 2 if the target is half as large, a transposed 4x4 with stride 2 if it is twice as large, and 1x1 if
    the sizes agree. For any other ratio the map is first resized, then convolved 1x1: the published code takes
    a kernel as large as the difference in size there, with hundreds of times the parameters.
    """
    if len(source) == 1:
        return nn.Sequential(nn.Linear(source[0], target[0]))
    (channels_in, *size_in), (channels_out, *size_out) = source, target
    layers: list[nn.Module]
    if size_in == [2 * length for length in size_out]:
        layers = [nn.Conv2d(channels_in, channels_out, kernel_size=3, stride=2, padding=1)]
    elif [2 * length for length in size_in] == size_out:
        layers = [nn.ConvTranspose2d(channels_in, channels_out, kernel_size=4, stride=2, padding=1)]
    else:
        layers = [nn.Conv2d(channels_in, channels_out, kernel_size=1)]
        if size_in != size_out:
            layers.insert(0, Resize(*size_out))
    return nn.Sequential(*layers, nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True))
