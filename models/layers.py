"""Small parts that several families share."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv1x1(channels: int, width: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A 1x1 convolution without bias, for a BatchNorm follows it."""
    return nn.Conv2d(channels, width, kernel_size=1, stride=stride, groups=groups, bias=False)


def conv3x3(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution without bias that keeps the size of the map (at stride 1)."""
    return nn.Conv2d(channels, width, kernel_size=3, stride=stride, padding=1, bias=False)


def depthwise3x3(channels: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution of every channel by itself, without bias."""
    return _Depthwise(channels, channels, 3, stride=stride, padding=1, groups=channels, bias=False)


class _Depthwise(nn.Conv2d):
    """Computes in float32 on a CPU, also under autocast.

    There the gradients of strided depthwise convolutions in bfloat16 take 50 to 140 times as long as in float32, and
    those of 2x2 maps 7 times: a KD step of ResNet50 to MobileNetV2 lost over a third of what bfloat16 gains it.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(x.dtype)


def relu(x: Tensor) -> Tensor:
    """ReLU that overwrites `x`: only for a tensor that was made within the same stage."""
    return F.relu(x, inplace=True)


def projection(channels: int, width: int, stride: int) -> nn.Sequential:
    """The shortcut of a residual block ``[B, channels, H, W]`` -> ``[B, width, H / stride, W / stride]``:
    nothing where the shape stays, 1x1 convolution and BatchNorm where it changes."""
    if channels == width and stride == 1:
        return nn.Sequential()
    return nn.Sequential(conv1x1(channels, width, stride), nn.BatchNorm2d(width))


def group(
    block: Callable[[int, int, int], nn.Module], channels: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    """`blocks` blocks in a row, the first of which changes width and resolution; each gives its ``expansion`` times
    `width` channels."""
    out = width * getattr(block, "expansion", 1)
    return nn.Sequential(block(channels, width, stride), *(block(out, width, 1) for _ in range(1, blocks)))


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal groups: ``[B, C, H, W]`` to the same shape."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def init_convolutions(model: nn.Module) -> None:
    """Draw every convolution from N(0, 2 / (k² · out channels)) and clear its bias.

    That is Kaiming's fan-out rule. A depthwise convolution counts all its output channels, as the
    published networks do.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linears(model: nn.Module) -> None:
    """Draw every linear layer from N(0, 0.01²) and clear its bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
