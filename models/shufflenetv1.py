"""ShuffleNetV1 with three groups, for small images.

Zhang, Zhou, Lin, Sun: ShuffleNet: an extremely efficient convolutional neural network for mobile devices, CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import channel_shuffle, conv1x1, depthwise3x3, group, relu
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool

GROUPS = 3
STEM_CHANNELS = 24


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1; beside it the input itself, added.

    With stride 2 the input is pooled and concatenated instead, so that the convolutions make only the
    ``width - channels`` channels that are missing: ``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``.
    """

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        made = width - channels if stride == 2 else width
        hidden = made // 4
        self.stride = stride
        # The stem has too few channels to be worth splitting.
        self.groups = 1 if channels == STEM_CHANNELS else GROUPS
        self.conv1 = conv1x1(channels, hidden, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(hidden)
        self.conv2 = depthwise3x3(hidden, stride)
        self.bn2 = nn.BatchNorm2d(hidden)
        self.conv3 = conv1x1(hidden, made, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(made)

    def forward(self, x: Tensor) -> Tensor:
        out = channel_shuffle(relu(self.bn1(self.conv1(x))), self.groups)
        out = relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        if self.stride == 1:
            return relu(out + x)
        return relu(torch.cat([out, F.avg_pool2d(x, kernel_size=3, stride=2, padding=1)], dim=1))


@register_model("ShuffleNetV1", "ShuffleV1")
class ShuffleNetV1(StagedModel):
    """Five features: the stem at full resolution, three groups (1/2, 1/4, 1/8 of it), the pooled vector."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = conv1x1(3, STEM_CHANNELS)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.layer1 = group(ShuffleUnit, STEM_CHANNELS, 240, blocks=4, stride=2)
        self.layer2 = group(ShuffleUnit, 240, 480, blocks=8, stride=2)
        self.layer3 = group(ShuffleUnit, 480, 960, blocks=4, stride=2)
        self.linear = nn.Linear(960, num_classes)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1, self.bn1, relu),
            (self.layer1,),
            (self.layer2,),
            (self.layer3,),
            (global_pool,),
            (self.linear,),
        )
