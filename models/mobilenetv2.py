"""MobileNetV2 at full width, and at half width (which the classic distillation benchmarks call MobileNetV2).

Sandler, Howard, Zhu, Zhmoginov, Chen: MobileNetV2: inverted residuals and linear bottlenecks, CVPR 2018; with plain
ReLU and fewer strides, for small images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.layers import conv1x1, conv3x3, depthwise3x3, group, init_convolutions, init_linears
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool

# Expansion factor, channels at full width, blocks, stride of the first block.
GROUPS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
LAST_CHANNELS = 1280


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: ``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int):
        super().__init__()
        hidden = expansion * channels
        self.is_residual = stride == 1 and channels == width
        self.conv = nn.Sequential(
            *_conv_bn_relu(conv1x1(channels, hidden)),
            *_conv_bn_relu(depthwise3x3(hidden, stride)),
            conv1x1(hidden, width),
            nn.BatchNorm2d(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.is_residual else self.conv(x)


class MobileNetV2(StagedModel):
    """Six features: the stem (half the image), groups 0-1, 2, 3-4 and 5-6 before any activation, the pooled vector.

    Args:
        width: factor on all channels but those of the last convolution.
    """

    def __init__(self, num_classes: int, width: float = 1.0):
        super().__init__()
        channels = int(32 * width)
        self.conv1 = _conv_bn_relu(conv3x3(3, channels, stride=2))
        self.blocks = nn.ModuleList()
        for expansion, full_width, blocks, stride in GROUPS:
            block = partial(InvertedResidual, expansion=expansion)
            self.blocks.append(group(block, channels, int(full_width * width), blocks, stride))
            channels = int(full_width * width)
        self.conv2 = _conv_bn_relu(conv1x1(channels, LAST_CHANNELS))
        self.classifier = nn.Sequential(nn.Linear(LAST_CHANNELS, num_classes))
        init_convolutions(self)
        init_linears(self)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1,),
            (self.blocks[0], self.blocks[1]),
            (self.blocks[2],),
            (self.blocks[3], self.blocks[4]),
            (self.blocks[5], self.blocks[6]),
            (self.conv2, global_pool),
            (self.classifier,),
        )


def _conv_bn_relu(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True))


register_model("MobileNetV2")(MobileNetV2)
register_model("MobileNetV2_half")(partial(MobileNetV2, width=0.5))
