"""The wide-bodied residual networks, with a stem for small images: ResNet18 .. ResNet152.

He, Zhang, Ren, Sun: Deep residual learning for image recognition, CVPR 2016, table 1; the 7x7 stem and the pooling
after it give way to one 3x3 convolution.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.layers import conv1x1, conv3x3, group, init_convolutions, projection, relu
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool


class BasicBlock(nn.Module):
    """Two 3x3 convolutions: ``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""

    expansion = 1

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = projection(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        return relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions: ``[B, channels, H, W]`` to ``[B, 4 width, H / stride, W / stride]``."""

    expansion = 4

    def __init__(self, channels: int, width: int, stride: int = 1):
        super().__init__()
        self.conv1 = conv1x1(channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, self.expansion * width)
        self.bn3 = nn.BatchNorm2d(self.expansion * width)
        self.shortcut = projection(channels, self.expansion * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = relu(self.bn1(self.conv1(x)))
        out = relu(self.bn2(self.conv2(out)))
        return relu(self.bn3(self.conv3(out)) + self.shortcut(x))


class ResNet(StagedModel):
    """Six features: the stem at full resolution, four groups (1 .. 1/8 of it), the pooled vector.

    Args:
        block: `BasicBlock` or `Bottleneck`.
        blocks: how many of them each of the four groups has.
    """

    def __init__(self, num_classes: int, block: type[BasicBlock | Bottleneck], blocks: Sequence[int]):
        super().__init__()
        out = [width * block.expansion for width in (64, 128, 256, 512)]
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = group(block, 64, 64, blocks[0], stride=1)
        self.layer2 = group(block, out[0], 128, blocks[1], stride=2)
        self.layer3 = group(block, out[1], 256, blocks[2], stride=2)
        self.layer4 = group(block, out[2], 512, blocks[3], stride=2)
        self.linear = nn.Linear(out[3], num_classes)
        init_convolutions(self)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1, self.bn1, relu),
            (self.layer1,),
            (self.layer2,),
            (self.layer3,),
            (self.layer4,),
            (global_pool,),
            (self.linear,),
        )


register_model("ResNet18")(partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2)))
register_model("ResNet34")(partial(ResNet, block=BasicBlock, blocks=(3, 4, 6, 3)))
register_model("ResNet50")(partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3)))
register_model("ResNet101")(partial(ResNet, block=Bottleneck, blocks=(3, 4, 23, 3)))
register_model("ResNet152")(partial(ResNet, block=Bottleneck, blocks=(3, 8, 36, 3)))
