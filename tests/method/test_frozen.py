"""Frozen networks that keep no activations give the very same gradient of their input."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from distillers.spot_adaptive.frozen import InputGradientsOnly
from models import get_model


def frozen(name):
    torch.manual_seed(1)
    model = get_model(name, 5).double().requires_grad_(False).eval()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model


def gradient_and_memory(model, image):
    """Logits, gradient of the image, and bytes that the graph keeps beyond the parameters."""
    image = image.clone().requires_grad_()
    kept = {}
    owned = {parameter.data_ptr() for parameter in model.parameters()}

    def remember(tensor):
        if tensor.data_ptr() not in owned:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        logits = model(image)
    logits.square().sum().backward()
    return logits.detach(), image.grad, sum(kept.values())


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("name", ["resnet8", "vgg8", "wrn_16_1", "MobileNetV2_half"])
def test_the_gradient_is_the_same_and_fewer_activations_are_kept(name, on_gpu, monkeypatch):
    """Also by the kernels that a GPU takes, which a CPU has too."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", on_gpu)
    model, image = frozen(name), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    logits, gradient, memory = gradient_and_memory(model, image)
    with InputGradientsOnly():
        logits_less, gradient_less, memory_less = gradient_and_memory(model, image)
    torch.testing.assert_close(logits_less, logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient_less, gradient, rtol=1e-10, atol=1e-12)
    assert memory_less < 0.75 * memory


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["resnet8", "vgg8"])
def test_the_backward_pass_copies_no_map(name, layout):
    model, image = frozen(name).to(memory_format=layout), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    image = image.to(memory_format=layout).requires_grad_()
    with InputGradientsOnly():
        logits = model(image)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        logits.sum().backward()
    convolutions = [event for event in profiler.events() if event.name == "aten::convolution_backward"]
    assert convolutions
    assert not [copy for event in convolutions for copy in event.cpu_children if "contig" in copy.name]


def test_layers_that_are_trained_keep_their_own_gradients():
    layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    image = torch.randn(2, 3, 8, 8)
    layers(image).sum().backward()
    expected = [parameter.grad.clone() for parameter in layers.parameters()]
    layers.zero_grad()
    with InputGradientsOnly():
        layers(image).sum().backward()
    assert all(torch.equal(p.grad, e) for p, e in zip(layers.parameters(), expected))


def test_half_precision_autocast_gives_a_gradient_as_well():
    model, image = frozen("resnet8").float(), torch.randn(2, 3, 32, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16), InputGradientsOnly():
        model(image).float().sum().backward()
    reference = image.grad.clone()
    image.grad = None
    model(image).sum().backward()
    torch.testing.assert_close(reference, image.grad, rtol=0.1, atol=0.1 * image.grad.abs().max().item())
