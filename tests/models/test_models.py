"""The registered networks: what published checkpoints expect of them, their stages, what they compute."""

from __future__ import annotations

import base64
import copy
import json
import lzma
import math
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import nn

from models import MODELS, get_model
from models.layers import depthwise3x3
from models.staged import StagedModel
from utils.errors import UserError

CONTRACT = json.loads((Path(__file__).with_name("model_contract.json")).read_text())
SPECIFIED = list(CONTRACT["models"])
ALIASES = {"ShuffleV1": "ShuffleNetV1", "ShuffleV2": "ShuffleNetV2"}

# One of every class, with the arguments that make them small.
SAMPLES = {
    "resnet8": {},
    "ResNet18": {"blocks": (1, 1, 1, 1)},
    "ResNet50": {"blocks": (1, 2, 1, 1)},
    "wrn_16_2": {},
    "vgg11": {},
    "vgg8-imagenet": {"hidden": 8},
    "MobileNetV2": {"width": 0.25},
    "ShuffleNetV1": {},
    "ShuffleNetV2": {},
}
every_specified = pytest.mark.parametrize("name", SPECIFIED)
every_sample = pytest.mark.parametrize("name", SAMPLES)


@cache
def published_state_dicts() -> dict[str, dict[str, list[int]]]:
    return json.loads(lzma.decompress(base64.b85decode("".join(CONTRACT["state_dicts"]))))


@cache
def shapes_only(name: str) -> StagedModel:
    """The model without memory or arithmetic; even drawing no weights takes PyTorch seconds."""
    with torch.device("meta"), patch.object(torch.Tensor, "normal_", lambda x, *_, **__: x):
        return get_model(name, 100)


def sample(name: str) -> StagedModel:
    return copy.deepcopy(_sample(name))


@cache
def _sample(name: str) -> StagedModel:
    """A small model in evaluation mode, with weights and BatchNorm statistics that are the same everywhere."""
    model, draw = get_model(name, 7, kwargs=SAMPLES[name]).eval(), np.random.RandomState(0).standard_normal
    for key, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            value = torch.from_numpy(draw(tensor.shape))
            if tensor.dim() > 1:
                value *= (2 / tensor[0].numel()) ** 0.5
            else:
                value = 0.3 * value.abs() + 0.7 if key.endswith("var") else 0.3 * value + key.endswith("weight")
            tensor.copy_(value)
    return model


def images(name: str) -> torch.Tensor:
    size = 32 if "imagenet" in name else 16
    return torch.from_numpy(np.random.RandomState(1).standard_normal((2, 3, size, size))).float()


class TestContract:
    @every_specified
    def test_has_the_published_parameters_under_their_keys_in_order(self, name):
        ours = [(key, list(tensor.shape)) for key, tensor in shapes_only(name).state_dict().items()]
        assert ours == list(map(tuple, published_state_dicts()[name].items()))
        parameters = sum(parameter.numel() for parameter in shapes_only(name).parameters())
        assert parameters == CONTRACT["models"][name]["parameters"]

    @every_specified
    @patch.object(nn.BatchNorm2d, "forward", lambda self, x: x)  # PyTorch derives its shape in a slow way
    def test_features_have_the_published_shapes(self, name):
        for size, shapes in CONTRACT["models"][name]["features"].items():
            if int(size) == 32 or name in SAMPLES:  # the depth of a network changes nothing about sizes
                ours = shapes_only(name).feature_shapes(int(size), int(size))
                assert [list(shape) for shape in ours] == shapes, f"at {size} pixels"

    def test_half_the_width_gives_the_mobilenet_of_the_classic_benchmarks(self):
        half = shapes_only("MobileNetV2_half")
        assert sum(parameter.numel() for parameter in half.parameters()) == 812_836
        assert list(half.state_dict()) == list(published_state_dicts()["MobileNetV2"])
        assert half.feature_shapes(32, 32) == [(16, 16, 16), (12, 16, 16), (16, 8, 8), (48, 4, 4), (160, 2, 2), (1280,)]

    @pytest.mark.parametrize("alias", ALIASES)
    def test_an_alias_builds_the_same_network(self, alias):
        assert MODELS.get(alias) is MODELS.get(ALIASES[alias])

    def test_a_name_is_exact_since_folders_and_config_files_have_it(self):
        with pytest.raises(UserError, match="model 'VGG13': its name is vgg13"):
            get_model("VGG13", 10)


class TestStages:
    @every_sample
    def test_no_stage_overwrites_what_it_is_handed_and_every_parameter_gets_a_gradient(self, name):
        model, x, total = sample(name).train(), images(name), 0
        for index in range(len(model.stages())):
            before = x.detach().clone()
            out = model.run(x, index, index + 1)
            assert torch.equal(x, before), f"stage {index}"
            x, total = out, total + out.square().mean()
        total.backward()
        assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []

    def test_vgg_pools_before_its_last_block_from_64_pixels_on(self):
        vgg = shapes_only("vgg8")
        assert [vgg.feature_shapes(size, size)[4] for size in (32, 64)] == [(512, 4, 4), (512, 4, 4)]
        assert vgg.feature_shapes(48, 96)[4] == (512, 6, 12)


class TestFeatureShapes:
    def test_leaves_modes_statistics_and_random_state_alone(self):
        model = get_model("resnet8", 10)
        model.layer2.eval()
        modes = {key: module.training for key, module in model.named_modules()}
        state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
        model.feature_shapes(32, 32)
        assert {key: module.training for key, module in model.named_modules()} == modes
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)


@every_sample
def test_logits_are_those_that_plain_formulas_have_given_for_the_same_weights(name):
    with torch.no_grad():
        logits = sample(name).double()(images(name)[:1].double())
    expected = torch.tensor([CONTRACT["logits"][name]], dtype=torch.float64)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_depthwise_convolutions_compute_in_float32_under_autocast():
    convolution = depthwise3x3(8, stride=2)
    x = torch.randn(2, 8, 8, 8).bfloat16()
    outcomes = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = convolution(x if enabled else x.float())
        (of_weight,) = torch.autograd.grad(y.bfloat16().sum(), convolution.weight)
        outcomes.append((y, of_weight))
    (half, half_gradient), (full, full_gradient) = outcomes
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, full.bfloat16())
    assert torch.equal(half_gradient, full_gradient)


class TestInitialisation:
    @pytest.mark.parametrize("name", ["resnet20", "wrn_16_2", "vgg8", "MobileNetV2_half"])
    def test_convolutions_are_normal_with_the_variance_of_their_fan_out(self, name):
        for module in get_model(name, 10).modules():
            if isinstance(module, nn.Conv2d) and module.weight.numel() >= 2000:
                expected = math.sqrt(2 / (module.kernel_size[0] ** 2 * module.out_channels))
                assert module.weight.std().item() == pytest.approx(expected, rel=0.08)
                assert abs(module.weight.mean().item()) < 0.1 * expected
                assert module.bias is None or not module.bias.any()

    @pytest.mark.parametrize("name", ["vgg8", "MobileNetV2_half"])
    def test_classifiers_of_vgg_and_mobilenet_start_small(self, name):
        weight, bias = list(get_model(name, 100).parameters())[-2:]
        assert weight.std().item() == pytest.approx(0.01, rel=0.05)
        assert not bias.any()

    def test_the_classifier_of_a_wide_resnet_starts_without_bias(self):
        assert not get_model("wrn_16_2", 10).fc.bias.any()

    def test_shufflenets_keep_the_default_of_the_framework(self):
        weight = get_model("ShuffleNetV2", 10).conv2.weight
        bound = 1 / math.sqrt(464)
        assert 0.99 * bound < weight.abs().max() <= bound
