"""Networks that are not ours, each with something that makes cutting it difficult."""

from __future__ import annotations

import random
import warnings
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import StagedModel
from models.staged import global_pool


class Chain(nn.Module):
    """Parts called in order of definition, with a flattening between them."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.classifier(self.pool(self.down(self.stem(x))).flatten(1))


class Unchained(nn.Module):
    """Parts defined in another order than called, and functions between them."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.fc = nn.Linear(8, num_classes)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2)
        self.conv1 = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv2(F.relu(self.conv1(x)))).mean(dim=(2, 3)))


class WeightNormed(Chain):
    """The weights of a convolution are computed in every forward."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.down[1] = parametrised(self.down[1])


def parametrised(layer: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # there is a newer one
        return nn.utils.weight_norm(layer)


class Squeezed(Chain):
    def forward(self, x):
        return super().forward(x).squeeze()


class Probabilities(Chain):
    def forward(self, x):
        return super().forward(x).softmax(dim=1)


class Skip(nn.Module):
    """A skip connection around the first convolution, in `forward`."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.same, self.conv = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x + self.same(x)).mean(dim=(2, 3)))


class FunctionalMaxPool(nn.Module):
    """Images are normalised within, and the vector is a flattened map."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, num_classes)

    def forward(self, x):
        return self.fc(F.max_pool2d(self.conv(x * 2 - 1), 2).flatten(1))


class TwoInputs(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1, self.bilinear = nn.Conv2d(3, 4, 3), nn.Bilinear(4, 3, num_classes)

    def forward(self, x):
        return self.bilinear(self.conv1(x).mean(dim=(2, 3)), x.mean(dim=(2, 3)))


class KeptBody(nn.Module):
    """Nothing before the classifier gets a gradient, or that in one of the two modes."""

    def __init__(self, num_classes: int, kept_in: tuple[bool, ...] = (False, True)):
        super().__init__()
        self.conv, self.down, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, 2), nn.Linear(4, num_classes)
        self.kept_in = kept_in

    def forward(self, x):
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.training not in self.kept_in):
            x = self.down(self.conv(x)).mean(dim=(2, 3))
        return self.fc(x)


class NeverTrained(Chain):
    @torch.no_grad()
    def forward(self, x):
        return super().forward(x)


class Listed(nn.Module):
    """Parts in a list, one of which is never called; one ReLU that is called again and again, and a dropout."""

    def __init__(self, num_classes: int):
        super().__init__()
        strides = (1, 1, 2)
        self.act, self.dropout = nn.ReLU(inplace=True), nn.Dropout(0.5)
        self.blocks = nn.ModuleList(nn.Conv2d(4 if k else 3, 4, 3, s, padding=1) for k, s in enumerate(strides))
        self.unused, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(4, num_classes)

    def forward(self, x):
        for block in self.blocks:
            x = self.act(block(x))
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


class Whole(nn.Module):
    """A network within another."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.net = Chain(num_classes)

    def forward(self, x):
        return self.net(x)


class PoolingClassifier(nn.Module):
    """As ConvNeXt: the classifier itself makes a vector of the map."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Conv2d(3, 4, 3, padding=1)
        self.classifier = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x))


class ConvolutionalClassifier(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, num_classes, 1)

    def forward(self, x):
        return self.fc(self.conv(x)).mean(dim=(2, 3))


class FunctionalDropout(Chain):
    def forward(self, x):
        return self.classifier(F.dropout(self.pool(self.down(self.stem(x))).flatten(1), 0.5, self.training))


class ZeroHead(Unchained):
    """Whose logits are zero, whatever the stages do."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        nn.init.zeros_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)


class DroppedInPlace(nn.Module):
    """As EfficientNet: the classifier overwrites the vector, in training mode alone."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.fc = nn.Sequential(nn.Dropout(0.5, inplace=True), nn.Linear(4, num_classes))

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).mean(dim=(2, 3)))


class Preactivated(nn.Module):
    """Functions in place at the beginning of a stage."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.down, self.fc = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 8, 3, 2), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.down(F.max_pool2d(F.relu_(self.conv(x)), 2)).sub_(1)
        x = x.mean(dim=(2, 3))
        x.mul_(2)
        return self.fc(x.relu_())


class Deciding(Chain):
    """Its own forward decides by the image, which torch.fx cannot follow."""

    def forward(self, x):
        return super().forward(x if x.mean() < 100 else x / 100)


class DecidingWithin(Chain):
    """A submodule does."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.stem = nn.Sequential(
            Deciding(3), nn.Linear(3, 3 * 4 * 4), nn.ReLU(), nn.Unflatten(1, (3, 4, 4)), self.stem
        )


class Scheduled(Chain):
    """Its logits are scaled by a number that the user may change, and a part may be switched off."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.scale, self.is_deep = 1.0, True

    def forward(self, x):
        x = self.down(self.stem(x)) if self.is_deep else self.stem(x)
        return self.classifier(self.pool(x).flatten(1)) * self.scale


class Counting(Chain):
    """Counts its steps, and its body is weak in the first of them."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.steps = 0

    def forward(self, x):
        self.steps += self.training
        x = self.pool(self.down(self.stem(x)) * min(1.0, 0.1 * self.steps))
        return self.classifier(x.flatten(1))


class Connected(nn.Module):
    """Decides by the image when it is trained; behind that, there is a classifier or not."""

    def __init__(self, num_classes: int, classifier: bool = True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.logits = nn.Conv2d(4, num_classes, 1)
        self.fc = nn.Linear(num_classes, num_classes) if classifier else None

    def forward(self, x):
        if self.training and x.mean() > 100:
            x = x / 100
        x = self.norm(self.conv(x)) + x.mean(dim=1, keepdim=True)
        x = self.logits(x).sigmoid().mean(dim=(2, 3))
        return x if self.fc is None else self.fc(x)


class Answer(Connected):
    """Gives more than logits, as networks of Hugging Face do."""

    def forward(self, x, labels=None):
        return {"loss": None, "logits": super().forward(x)}


class Exits(Chain):
    """Gives logits twice, and does not say which are meant."""

    def forward(self, x):
        return [super().forward(x), super().forward(x)]


class Outputs(NamedTuple):
    auxiliary: torch.Tensor
    logits: torch.Tensor


class Auxiliary(Chain):
    """Has a second classifier while it is trained, as GoogLeNet does."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.second = nn.Linear(4, num_classes)

    def forward(self, x):
        x = self.stem(x)
        second = self.second(x.mean(dim=(2, 3))) if self.training else None
        logits = self.classifier(self.pool(self.down(x)).flatten(1))
        return Outputs(second, logits) if self.training else logits


class LayerDrop(nn.Module):
    """Leaves a layer out at random, drawn by Python."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, num_classes)

    def forward(self, x):
        x = self.conv(x) if not self.training or random.random() < 0.5 else x
        return self.fc(x.mean(dim=(2, 3)))


class OddNames(nn.Module):
    """Submodules called as what a view has; its `train` keeps the BatchNorm as it is."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features, self.stages = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, 2)
        self.run, self.step = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, 2)
        self.shapes, self.forward_features = nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1)
        self.network, self.pieces = nn.Flatten(), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.step(self.run(self.stages(self.features(x))))
        return self.pieces(self.network(self.forward_features(self.shapes(x))))

    def train(self, mode: bool = True):
        super().train(mode)
        self.run.eval()
        return self


class WithRootTensors(Chain):
    """Parameters and buffers of the root itself, and one part under two names."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.head = self.classifier


class Transformer(nn.Module):
    """A class token and positions, as a ViT has them; blocks that see the whole sequence."""

    def __init__(self, num_classes: int, width: int = 6, patch: int = 8):
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 17, width))
        self.first, self.second = nn.LayerNorm(width), nn.TransformerEncoderLayer(width, 2, 8, 0, batch_first=True)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places
        return self.head(self.second(self.first(x))[:, 0])


class ChannelsAtTheEnd(nn.Module):
    """As Swin: maps are [B, H, W, C]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem, self.move = nn.Conv2d(3, 6, 4, 4), torchvision.ops.Permute([0, 2, 3, 1])
        self.norm, self.back = nn.LayerNorm(6), torchvision.ops.Permute([0, 3, 1, 2])
        self.fc = nn.Linear(6, num_classes)

    def forward(self, x):
        return self.fc(self.back(self.norm(self.move(self.stem(x)))).mean(dim=(2, 3)))


class SevenClasses(Chain):
    def __init__(self, num_classes: int):
        super().__init__(7)


class Failing(nn.Module):
    def __init__(self, num_classes: int):
        raise RuntimeError("no weights here\nsecond line")


class Uncopyable(Chain):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


def in_parallel(num_classes: int) -> nn.Module:
    """As scripts for several GPUs hand their networks on."""
    return nn.DataParallel(Connected(num_classes))


class Own(StagedModel):
    """Cut into stages by its own class."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def stages(self):
        return ((self.conv, F.relu), (global_pool,), (self.fc,))


def perceptron(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, num_classes))


def not_a_module(num_classes: int) -> int:
    return num_classes
