"""The networks once more, each as a plain formula over a `state_dict`, to hold the modules against."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Weights:
    """Layers by the name of their weights."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def has(self, key: str) -> bool:
        return any(name.startswith(f"{key}.") for name in self.state)

    def blocks(self, key: str) -> list[str]:
        """``["layer1.0", "layer1.1", ...]``: as many as there are."""
        indices = {int(name[len(key) + 1 :].split(".")[0]) for name in self.state if name.startswith(f"{key}.")}
        return [f"{key}.{index}" for index in sorted(indices)]

    def conv(self, x: Tensor, key: str, stride: int = 1) -> Tensor:
        weight = self.state[f"{key}.weight"]
        groups = x.shape[1] // weight.shape[1]
        return F.conv2d(x, weight, self.state.get(f"{key}.bias"), stride, weight.shape[-1] // 2, groups=groups)

    def norm(self, x: Tensor, key: str) -> Tensor:
        mean, var, weight, bias = (
            self.state[f"{key}.{name}"].view(1, -1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def linear(self, x: Tensor, key: str) -> Tensor:
        return x @ self.state[f"{key}.weight"].T + self.state[f"{key}.bias"]


def positive(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def average(x: Tensor) -> Tensor:
    return x.flatten(2).sum(dim=2) / x[0, 0].numel()


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i of every group, then channel i + 1 of every group, ..."""
    size = x.shape[1] // groups
    return x[:, [group * size + i for i in range(size) for group in range(groups)]]


def resnet(w: Weights, x: Tensor, layers: int, shortcut: str, classifier: str) -> Tensor:
    x = positive(w.norm(w.conv(x, "conv1"), "bn1"))
    for layer in range(1, layers + 1):
        for index, block in enumerate(w.blocks(f"layer{layer}")):
            stride = 2 if layer > 1 and index == 0 else 1
            strides = (1, stride, 1) if w.has(f"{block}.conv3") else (stride, 1)
            out = x
            for number, step in enumerate(strides, start=1):
                out = w.norm(w.conv(out, f"{block}.conv{number}", step), f"{block}.bn{number}")
                out = positive(out) if number < len(strides) else out
            if w.has(f"{block}.{shortcut}"):
                x = w.norm(w.conv(x, f"{block}.{shortcut}.0", stride), f"{block}.{shortcut}.1")
            x = positive(out + x)
    return w.linear(average(x), classifier)


def wide_resnet(w: Weights, x: Tensor) -> Tensor:
    x = w.conv(x, "conv1")
    for layer in (1, 2, 3):
        for index, block in enumerate(w.blocks(f"block{layer}.layer")):
            stride = 2 if layer > 1 and index == 0 else 1
            active = positive(w.norm(x, f"{block}.bn1"))
            out = positive(w.norm(w.conv(active, f"{block}.conv1", stride), f"{block}.bn2"))
            out = w.conv(out, f"{block}.conv2")
            widens = w.has(f"{block}.convShortcut")
            x = out + (w.conv(active, f"{block}.convShortcut", stride) if widens else x)
    return w.linear(average(positive(w.norm(x, "bn1"))), "fc")


def vgg_maps(w: Weights, x: Tensor, halved: tuple[int, ...]) -> Tensor:
    for block in range(5):
        if block in halved:
            x = F.max_pool2d(x, 2)
        position = 0
        while w.has(f"block{block}.{position}"):
            x = positive(w.norm(w.conv(x, f"block{block}.{position}"), f"block{block}.{position + 1}"))
            position += 3
    return x


def vgg(w: Weights, x: Tensor) -> Tensor:
    return w.linear(average(vgg_maps(w, x, halved=(1, 2, 3))), "classifier")


def vgg_imagenet(w: Weights, x: Tensor) -> Tensor:
    x = F.max_pool2d(vgg_maps(w, x, halved=(1, 2, 3, 4)), 2)
    x = F.adaptive_avg_pool2d(x, 7).reshape(len(x), -1)
    x = positive(w.linear(x, "classifier.0"))
    return w.linear(positive(w.linear(x, "classifier.3")), "classifier.6")


def mobilenet_v2(w: Weights, x: Tensor) -> Tensor:
    x = positive(w.norm(w.conv(x, "conv1.0", stride=2), "conv1.1"))
    for group, first_stride in enumerate((1, 1, 2, 2, 1, 2, 1)):
        for index, block in enumerate(w.blocks(f"blocks.{group}")):
            stride = first_stride if index == 0 else 1
            out = positive(w.norm(w.conv(x, f"{block}.conv.0"), f"{block}.conv.1"))
            out = positive(w.norm(w.conv(out, f"{block}.conv.3", stride), f"{block}.conv.4"))
            out = w.norm(w.conv(out, f"{block}.conv.6"), f"{block}.conv.7")
            x = x + out if x.shape == out.shape else out
    x = positive(w.norm(w.conv(x, "conv2.0"), "conv2.1"))
    return w.linear(average(x), "classifier.0")


def shufflenet_v1(w: Weights, x: Tensor) -> Tensor:
    x = positive(w.norm(w.conv(x, "conv1"), "bn1"))
    for layer in (1, 2, 3):
        for index, block in enumerate(w.blocks(f"layer{layer}")):
            stride = 2 if index == 0 else 1
            out = positive(w.norm(w.conv(x, f"{block}.conv1"), f"{block}.bn1"))
            out = shuffle(out, 1 if x.shape[1] == 24 else 3)
            out = positive(w.norm(w.conv(out, f"{block}.conv2", stride), f"{block}.bn2"))
            out = w.norm(w.conv(out, f"{block}.conv3"), f"{block}.bn3")
            pooled = F.avg_pool2d(x, 3, stride=2, padding=1)
            x = positive(torch.cat([out, pooled], dim=1) if stride == 2 else out + x)
    return w.linear(average(x), "linear")


def shufflenet_v2(w: Weights, x: Tensor) -> Tensor:
    x = positive(w.norm(w.conv(x, "conv1"), "bn1"))
    for layer in (1, 2, 3):
        for index, block in enumerate(w.blocks(f"layer{layer}")):
            if index == 0:
                left = w.norm(w.conv(x, f"{block}.conv1", stride=2), f"{block}.bn1")
                left = positive(w.norm(w.conv(left, f"{block}.conv2"), f"{block}.bn2"))
                first, stride, right = 3, 2, x
            else:
                left, right = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
                first, stride = 1, 1
            right = positive(w.norm(w.conv(right, f"{block}.conv{first}"), f"{block}.bn{first}"))
            right = w.norm(w.conv(right, f"{block}.conv{first + 1}", stride), f"{block}.bn{first + 1}")
            right = positive(w.norm(w.conv(right, f"{block}.conv{first + 2}"), f"{block}.bn{first + 2}"))
            x = shuffle(torch.cat([left, right], dim=1), 2)
    x = positive(w.norm(w.conv(x, "conv2"), "bn2"))
    return w.linear(average(x), "linear")
