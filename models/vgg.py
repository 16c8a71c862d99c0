"""VGG networks with BatchNorm: vgg8 .. vgg19 for small images, vgg8-imagenet .. vgg19-imagenet for 224 pixels.

Simonyan, Zisserman: Very deep convolutional networks for large-scale image recognition, ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import init_convolutions, init_linears, relu
from models.pooling import adaptive_average_pool
from models.registry import register_model
from models.staged import Stage, StagedModel, global_pool

CONVOLUTIONS = {8: (1, 1, 1, 1, 1), 11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}


class VGG(StagedModel):
    """Six features: five blocks of convolutions after their ReLU, and the vector that the classifier takes: the pooled
    map ``[B, 512]``, or for ImageNet the last map ``[B, 512 * 7 * 7]``.

    Args:
        depth: weighted layers of the published network.
        hidden: width of the classifier's two hidden layers, which it has for ImageNet.
    """

    def __init__(self, num_classes: int, depth: int, hidden: int | None = None):
        super().__init__()
        counts = CONVOLUTIONS[depth]
        self.block0 = _block(3, 64, counts[0])
        self.block1 = _block(64, 128, counts[1])
        self.block2 = _block(128, 256, counts[2])
        self.block3 = _block(256, 512, counts[3])
        self.block4 = _block(512, 512, counts[4])
        if hidden is None:
            self.classifier = nn.Linear(512, num_classes)
            self._before_block4, self._vector = (_halve_large,), (global_pool,)
        else:
            self.classifier = nn.Sequential(
                nn.Linear(512 * 7 * 7, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, hidden),
                nn.ReLU(inplace=True),
                nn.Dropout(),
                nn.Linear(hidden, num_classes),
            )
            self._before_block4, self._vector = (_halve,), (_halve, _to_vector)
        init_convolutions(self)
        init_linears(self)

    def stages(self) -> Sequence[Stage]:
        return (
            (self.block0, relu),
            (_halve, self.block1, relu),
            (_halve, self.block2, relu),
            (_halve, self.block3, relu),
            (*self._before_block4, self.block4, relu),
            self._vector,
            (self.classifier,),
        )


def _block(channels: int, width: int, convolutions: int) -> nn.Sequential:
    """Convolution, BatchNorm, ReLU, repeated; without the last ReLU, which the stage applies."""
    layers: list[nn.Module] = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        channels = width
    return nn.Sequential(*layers[:-1])


def _halve(x: Tensor) -> Tensor:
    return F.max_pool2d(x, kernel_size=2)


def _halve_large(x: Tensor) -> Tensor:
    """Halve maps of at least 8x8: the 4x4 map of a 32-pixel image goes on as it is."""
    return _halve(x) if min(x.shape[2:]) >= 8 else x


def _to_vector(x: Tensor) -> Tensor:
    """``[B, 512, H, W]`` to ``[B, 512 * 7 * 7]``, whatever the size of the image."""
    return adaptive_average_pool(x, 7, 7).flatten(1)


for _depth in CONVOLUTIONS:
    register_model(f"vgg{_depth}")(partial(VGG, depth=_depth))
for _depth in CONVOLUTIONS:
    register_model(f"vgg{_depth}-imagenet")(partial(VGG, depth=_depth, hidden=4096))
