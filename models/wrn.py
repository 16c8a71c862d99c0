"""Wide residual networks: wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2 (depth, widening factor).

Zagoruyko, Komodakis: Wide residual networks, BMVC 2016.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from models.layers import conv1x1, conv3x3, group, init_convolutions, relu
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool


class PreActBlock(nn.Module):
    """BatchNorm and ReLU before each convolution: ``[B, channels, H, W]`` to ``[B, width, H / stride, W / stride]``."""

    def __init__(self, channels: int, width: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        # The name is the one that published checkpoints use.
        self.convShortcut = None if channels == width else conv1x1(channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = relu(self.bn1(x))
        out = self.conv2(relu(self.bn2(self.conv1(active))))
        # A block that widens projects the activated input; any other adds the raw one.
        return out + (x if self.convShortcut is None else self.convShortcut(active))


class WideResNet(StagedModel):
    """Five features: the bare stem convolution, three groups as their last addition leaves them, the pooled vector.

    Args:
        depth: number of weighted layers, ``6 n + 4`` for ``n`` blocks a group.
        widening: factor on the widths 16, 32, 64 of the groups.
    """

    def __init__(self, num_classes: int, depth: int, widening: int):
        super().__init__()
        blocks = (depth - 4) // 6
        widths = [width * widening for width in (16, 32, 64)]
        self.conv1 = conv3x3(3, 16)
        self.block1 = _group(16, widths[0], blocks, stride=1)
        self.block2 = _group(widths[0], widths[1], blocks, stride=2)
        self.block3 = _group(widths[1], widths[2], blocks, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.fc = nn.Linear(widths[2], num_classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.conv1,),
            (self.block1,),
            (self.block2,),
            (self.block3,),
            (self.bn1, relu, global_pool),
            (self.fc,),
        )


def _group(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    # The name is the one that published checkpoints use.
    return nn.Sequential(OrderedDict(layer=group(PreActBlock, channels, width, blocks, stride)))


for _depth, _widening in ((16, 1), (16, 2), (40, 1), (40, 2), (28, 10)):
    register_model(f"wrn_{_depth}_{_widening}")(partial(WideResNet, depth=_depth, widening=_widening))
