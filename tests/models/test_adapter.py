"""Adapters: which layers stand between two shapes, what comes out, and that they learn."""

import pytest
import torch
from torch import nn

from models.adapter import Resize, make_adapter

# (source, target, layers, kernel and stride of the convolution): every ratio of sizes that two features can have.
MAPS = [
    ((8, 16, 16), (12, 8, 8), [nn.Conv2d], (3, 2)),
    ((8, 8, 8), (12, 16, 16), [nn.ConvTranspose2d], (4, 2)),
    ((8, 8, 8), (12, 8, 8), [nn.Conv2d], (1, 1)),
    ((8, 16, 16), (12, 4, 4), [Resize, nn.Conv2d], (1, 1)),
    ((8, 4, 4), (12, 7, 7), [Resize, nn.Conv2d], (1, 1)),
    ((8, 16, 8), (12, 8, 16), [Resize, nn.Conv2d], (1, 1)),
    ((8, 16, 16), (12, 8, 16), [Resize, nn.Conv2d], (1, 1)),
    ((8, 2, 2), (12, 1, 1), [nn.Conv2d], (3, 2)),
]


@pytest.mark.parametrize(("source", "target", "layers", "kernel"), MAPS)
def test_the_ratio_of_the_sizes_decides_on_the_layers_which_all_learn(source, target, layers, kernel):
    adapter, x = make_adapter(source, target), torch.randn(3, *source, requires_grad=True)
    assert [type(layer) for layer in adapter] == [*layers, nn.BatchNorm2d, nn.ReLU]
    convolution = adapter[len(layers) - 1]
    assert (convolution.kernel_size[0], convolution.stride[0]) == kernel
    y = adapter(x)
    assert y.shape == (3, *target)
    (y * torch.randn(3, *target)).sum().backward()
    assert x.grad.any()
    assert all(parameter.grad is not None for parameter in adapter.parameters())


def test_shrinking_averages_and_growing_interpolates():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert torch.equal(Resize(1, 1)(x), x.mean().view(1, 1, 1, 1))
    assert torch.equal(Resize(2, 2)(x).flatten(), torch.tensor([2.5, 4.5, 10.5, 12.5]))
    grown = Resize(8, 8)(x)
    assert grown.shape == (1, 1, 8, 8)
    assert grown.min() >= 0
    assert grown.max() <= 15


def test_vectors_meet_through_one_linear_layer():
    adapter = make_adapter((64,), (100,))
    assert [type(layer) for layer in adapter] == [nn.Linear]
    assert adapter(torch.randn(3, 64)).shape == (3, 100)
