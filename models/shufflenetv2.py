"""ShuffleNetV2 at width 1, for small images.

Ma, Zhang, Zheng, Sun: ShuffleNet V2: practical guidelines for efficient CNN architecture design, ECCV 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.layers import channel_shuffle, conv1x1, depthwise3x3, relu
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool


class BasicUnit(nn.Module):
    """One half of the channels passes, the other is transformed: ``[B, C, H, W]`` to the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise3x3(half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        kept, out = x.chunk(2, dim=1)
        out = relu(self.bn1(self.conv1(out)))
        out = self.bn2(self.conv2(out))
        out = relu(self.bn3(self.conv3(out)))
        return channel_shuffle(torch.cat([kept, out], dim=1), groups=2)


class DownUnit(nn.Module):
    """Two branches, both of which see all channels: ``[B, channels, H, W]`` to ``[B, width, H / 2, W / 2]``."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        half = width // 2
        # Left branch.
        self.conv1 = depthwise3x3(channels, stride=2)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = conv1x1(channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        # Right branch.
        self.conv3 = conv1x1(channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = relu(self.bn2(self.conv2(left)))
        right = relu(self.bn3(self.conv3(x)))
        right = self.bn4(self.conv4(right))
        right = relu(self.bn5(self.conv5(right)))
        return channel_shuffle(torch.cat([left, right], dim=1), groups=2)


@register_model("ShuffleNetV2", "ShuffleV2")
class ShuffleNetV2(StagedModel):
    """Five features: the stem at full resolution, three groups (1/2, 1/4, 1/8 of it), the pooled vector."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _group(24, 116, units=4)
        self.layer2 = _group(116, 232, units=8)
        self.layer3 = _group(232, 464, units=4)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1, self.bn1, relu),
            (self.layer1,),
            (self.layer2,),
            (self.layer3,),
            (self.conv2, self.bn2, relu, global_pool),
            (self.linear,),
        )


def _group(channels: int, width: int, units: int) -> nn.Sequential:
    return nn.Sequential(DownUnit(channels, width), *(BasicUnit(width) for _ in range(1, units)))
