"""The slim residual networks for small images: resnet8 .. resnet110, resnet8x4, resnet32x4.

He, Zhang, Ren, Sun: Deep residual learning for image recognition, CVPR 2016, section 4.2; with the shortcuts
projected where the shape changes, and four times as wide in the ``x4`` variants.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.layers import conv3x3, group, init_convolutions, projection, relu
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool


class BasicBlock(nn.Module):
    """``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.downsample(x))


class CifarResNet(StagedModel):
    """Five features: the stem at full resolution, three groups (1, 1/2, 1/4 of it), the pooled vector.

    Args:
        depth: number of weighted layers, ``6 n + 2`` for ``n`` blocks a group.
        widths: channels of the stem and of the three groups.
    """

    def __init__(self, num_classes: int, depth: int, widths: Sequence[int]):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = group(BasicBlock, widths[0], widths[1], blocks, stride=1)
        self.layer2 = group(BasicBlock, widths[1], widths[2], blocks, stride=2)
        self.layer3 = group(BasicBlock, widths[2], widths[3], blocks, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        init_convolutions(self)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1, self.bn1, relu),
            (self.layer1,),
            (self.layer2,),
            (self.layer3,),
            (global_pool,),
            (self.fc,),
        )


for _depth in (8, 14, 20, 32, 44, 56, 110):
    register_model(f"resnet{_depth}")(partial(CifarResNet, depth=_depth, widths=(16, 16, 32, 64)))
for _depth in (8, 32):
    register_model(f"resnet{_depth}x4")(partial(CifarResNet, depth=_depth, widths=(32, 64, 128, 256)))
