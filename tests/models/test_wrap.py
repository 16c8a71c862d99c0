"""Networks of one's own: cut by themselves or as told, with weights in the original's format, or one clear line."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import StagedModel, get_model, wrap_model
from models.staged import global_pool
from models.wrapping.layout import ChannelsLast, Tokens, find_layout
from utils.config import ModelConfig
from utils.config.yaml_text import parse_yaml
from utils.errors import UserError

SIZE = (32, 32)
RESNET_STAGES = [
    ["conv1", "bn1", "relu", "maxpool"],
    ["layer1"],
    ["layer2"],
    ["layer3"],
    ["layer4"],
    ["avgpool", "flatten"],
    ["fc"],
]


def wrap(network, stages=None, image_size=SIZE, num_classes=10, **kwargs) -> StagedModel:
    """Wrap a class of this file, or whatever a path leads to."""
    path = network if isinstance(network, str) else f"{__name__}.{network.__name__}"
    return wrap_model(path, num_classes, stages, kwargs, image_size)


def complaint(network, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        wrap(network, *args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


def images(count: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size)


class Chain(nn.Module):
    """Parts called in order of definition, but for the flattening."""

    def __init__(self, num_classes: int, width: int = 4):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.down = nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(width, 8, 3, padding=1), nn.ReLU(inplace=True))
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


UNCHAINED_STAGES = [["conv1", "relu"], ["conv2", "relu"], ["pool"], ["fc"]]


class Skip(nn.Module):
    """Two convolutions and a skip connection around the first."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.same, self.conv = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x + self.same(x)).mean(dim=(2, 3)))


class NestedSkip(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.net = Skip(num_classes)

    def forward(self, x):
        return self.net(x)


class SkipOverAll(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, num_classes, 3), nn.Linear(num_classes, num_classes)

    def forward(self, x):
        x = self.conv(x).mean(dim=(2, 3))
        return x + self.fc(x)


class PreNormalised(Unchained):
    def forward(self, x):
        return super().forward(x * 2 - 1)


class FunctionalMaxPool(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 16 * 16, num_classes)

    def forward(self, x):
        return self.fc(F.max_pool2d(self.conv(x), 2).flatten(1))


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


class Residual(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return F.relu(x + self.conv(x), inplace=True)


class SkipWithin(nn.Module):
    """A residual block, and functions in place between the parts."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.stem, self.block, self.down = nn.Conv2d(3, 8, 3, padding=1), Residual(8), nn.Conv2d(8, 4, 2, stride=2)
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        x = F.relu(self.stem(x), inplace=True)
        return self.fc(F.adaptive_avg_pool2d(F.relu_(self.down(self.block(x))), 1).flatten(1))


class Listed(nn.Module):
    """Parts in a list, one of which is never called."""

    def __init__(self, num_classes: int):
        super().__init__()
        strides = (1, 1, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(4 if k else 3, 4, 3, s, padding=1) for k, s in enumerate(strides))
        self.unused, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(4, num_classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean(dim=(2, 3)))


class Reused(Chain):
    """One ReLU called twice, a dropout, and another order of definition."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.stem, self.down = self.stem[:2], self.down[:2]
        self.dropout, self.act = nn.Dropout(0.5), nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.act(self.down(self.act(self.stem(x))))
        return self.classifier(self.dropout(self.pool(x).flatten(1)))


class Whole(nn.Module):
    """A network within another."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.net = Chain(num_classes)

    def forward(self, x):
        return self.net(x)


class FlattenedFirst(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, num_classes))

    def forward(self, x):
        return self.net(x.flatten(1))


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


class Doubler(nn.Module):
    def forward(self, x):
        return x.mul_(2)


class Overwriting(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.twice = Doubler()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.twice(self.conv(x)).mean(dim=(2, 3)))


class WithRootTensors(Chain):
    """Parameters and buffers of the root itself, and one part under two names."""

    def __init__(self, num_classes: int):
        super().__init__(num_classes)
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)
        self.head = self.classifier


class Recurrent(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.rnn, self.fc = nn.RNN(12, 4), nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.rnn(x.flatten(1))[0])


class TwoOutputs(Chain):
    def forward(self, x):
        return super().forward(x), x


class SevenClasses(Chain):
    def __init__(self, num_classes: int):
        super().__init__(7)


class Failing(nn.Module):
    def __init__(self, num_classes: int):
        raise RuntimeError("no weights here\nsecond line")


class Uncopyable(Chain):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


class Own(StagedModel):
    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, num_classes)

    def stages(self):
        return ((self.conv, F.relu), (global_pool,), (self.fc,))


def plain_sequential(num_classes: int) -> nn.Sequential:
    body = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, num_classes))


def perceptron(num_classes: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 16), nn.ReLU(), nn.Linear(16, num_classes))


def not_a_module(num_classes: int) -> int:
    return num_classes


TORCHVISION = ["resnet18", "resnet34", "resnet50", "mobilenet_v2"]


class TestTorchvision:
    @pytest.fixture(params=TORCHVISION)
    def pair(self, request):
        """A torchvision network and its wrapped version with the same weights."""
        original = getattr(torchvision.models, request.param)(num_classes=10)
        wrapped = wrap(f"torchvision.models.{request.param}")
        wrapped.load_state_dict(original.state_dict(), strict=True)
        return original.eval(), wrapped.eval()

    def test_keys_and_logits_are_the_originals_and_weights_go_back(self, pair):
        original, wrapped = pair
        assert list(wrapped.state_dict()) == list(original.state_dict())
        assert [name for name, _ in wrapped.named_parameters()] == [name for name, _ in original.named_parameters()]
        original.load_state_dict(wrapped.state_dict(), strict=True)
        with torch.no_grad():
            x = images(size=(64, 64))
            torch.testing.assert_close(wrapped(x), original(x), rtol=1e-5, atol=1e-6)

    def test_resnets_are_cut_at_their_layers(self):
        assert wrap("torchvision.models.resnet18").feature_shapes(64, 64) == [
            (64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,),
        ]  # fmt: skip

    def test_mobilenet_is_cut_where_the_resolution_changes(self):
        assert wrap("torchvision.models.mobilenet_v2", image_size=(64, 64)).feature_shapes(64, 64) == [
            (16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (1280, 2, 2), (1280,),
        ]  # fmt: skip

    def test_explicit_stages_say_the_same_as_the_automatic_cut(self):
        torch.manual_seed(3)
        automatic = wrap("torchvision.models.resnet18").eval()
        torch.manual_seed(3)
        explicit = wrap("torchvision.models.resnet18", RESNET_STAGES).eval()
        x = images()
        with torch.no_grad():
            assert torch.equal(explicit(x), automatic(x))

    def test_slices_and_operations_cut_a_mobilenet(self):
        stages = [["features.0:4"], ["features.4", "features.5:7"], ["features.7:"], ["pool"], ["classifier"]]
        model = wrap("torchvision.models.mobilenet_v2", stages, image_size=(64, 64))
        assert model.feature_shapes(64, 64) == [(24, 16, 16), (32, 8, 8), (1280, 2, 2), (1280,)]

    def test_get_model_takes_the_import_path_stages_and_arguments(self):
        model = get_model(
            "torchvision.models.resnet18",
            7,
            stages=RESNET_STAGES,
            kwargs={"zero_init_residual": True},
            image_size=(48, 32),
        )
        assert model(images(size=(48, 32))).shape == (2, 7)
        assert not model.layer1[0].bn2.weight.any()


class TestAutomaticCut:
    @pytest.mark.parametrize(
        ("network", "shapes"),
        [
            (Chain, [(4, 32, 32), (8, 16, 16), (8,)]),
            (plain_sequential, [(4, 32, 32), (8, 16, 16), (8,)]),
            (perceptron, [(16,)]),
            (Unchained, [(4, 30, 30), (8, 14, 14), (8,)]),
            (Listed, [(4, 32, 32), (4, 16, 16), (4,)]),
            (Reused, [(4, 32, 32), (8, 16, 16), (8,)]),
            (Whole, [(4, 32, 32), (8, 16, 16), (8,)]),
            (FlattenedFirst, [(16,)]),
            (WithRootTensors, [(4, 32, 32), (8, 16, 16), (8,)]),
            (PoolingClassifier, [(4, 32, 32), (4,)]),
        ],
    )
    def test_a_chain_of_parts_is_cut_where_the_resolution_changes(self, network, shapes):
        assert wrap(network).feature_shapes(*SIZE) == shapes

    def test_a_staged_model_of_the_user_is_taken_as_it_is(self):
        assert wrap(Own).feature_shapes(*SIZE) == [(4, 30, 30), (4,)]
        assert "leave `stages` out" in complaint(Own, [["conv"], ["pool"], ["fc"]])

    @pytest.mark.parametrize(
        ("network", "shapes", "place"),
        [
            (Skip, [(3, 32, 32), (4, 30, 30), (4,)], "between 'same' and 'conv'"),
            (SkipOverAll, [(10,)], "after 'fc'"),
            (PreNormalised, [(4, 30, 30), (8, 14, 14), (8,)], "before 'conv1'"),
            (FunctionalMaxPool, [(1024,)], "between 'conv' and 'fc'"),
            (TwoInputs, [(10,)], "between 'conv1' and 'bilinear'"),
            (NestedSkip, [(3, 32, 32), (4, 30, 30), (4,)], "between 'net.same' and 'net.conv'"),
        ],
    )
    def test_what_stages_cannot_express_is_within_the_first_of_them_and_what_would_do_is_told(
        self, network, shapes, place
    ):
        model = wrap(network)
        assert model.feature_shapes(*SIZE) == shapes
        assert model.uncut == (
            f"{place} its forward does what stages cannot express, such as a skip connection or a function other than "
            "relu, flatten, pool, token; put it, with all that a connection skips, into a submodule of its own"
        )

    @pytest.mark.parametrize("network", [Skip, SkipOverAll, TwoInputs, FunctionalDropout, ConvolutionalClassifier])
    def test_a_network_that_cannot_be_cut_runs_as_body_and_classifier_or_as_one_piece(self, network):
        model = wrap(network).eval()
        original, x = network(10).eval(), images()
        original.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model(x), original(x))
            features, logits = model.features(x)
            torch.testing.assert_close(logits, model(x))
            assert torch.equal(model.run(features[-1], start=len(features)), logits)
        assert model.one_piece == (len(model.stages()[-1]) == 0) == (features[-1] is logits)
        twin = copy.deepcopy(model).train()  # stands on its own, and follows its own mode and parts
        for module in model.modules():
            module.register_parameter("unused", None)
        for parameter in model.parameters():
            parameter.data.zero_()
        assert twin(x).any()
        assert all(part.training for part in (twin, twin._whole[0]))
        twin(x).square().sum().backward()
        assert all(parameter.grad is not None for parameter in twin.parameters())

    def test_a_skip_connection_within_a_submodule_is_no_obstacle(self):
        assert wrap(SkipWithin).feature_shapes(*SIZE) == [(8, 32, 32), (4, 16, 16), (4,)]

    def test_a_dropout_called_as_a_function_is_not_lost_silently(self):
        model = wrap(FunctionalDropout)
        assert model.feature_shapes(*SIZE) == [(8,)]
        assert "in training mode" in model.uncut
        assert model.uncut.endswith("; is a dropout called as a function? Make it a part of the network (nn.Dropout)")
        assert len({model.run(torch.ones(1, 3, *SIZE), stop=1).count_nonzero().item() for _ in range(9)}) > 1

    def test_a_network_whose_classifier_takes_a_map_is_one_piece(self):
        model = wrap(ConvolutionalClassifier)
        assert model.one_piece
        assert "the last feature, before [fc, pool], must be a vector" in model.uncut

    def test_what_comes_before_a_part_may_be_named_as_the_first_step(self):
        model = wrap(Skip, [["before conv"], ["conv", "pool"], ["fc"]])
        assert model.feature_shapes(*SIZE) == [(3, 32, 32), (4,)]
        assert model.parameters_until(1) == list(model.same.parameters())
        assert "forward does not call 'unused' with one tensor" in complaint(Listed, [["before unused"], ["fc"]])
        assert "there is no 'nowhere'" in complaint(Skip, [["before nowhere"], ["fc"]])


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


class TestLayouts:
    def test_tokens_become_a_map_whose_first_tokens_are_repeated_everywhere(self):
        stages = [["before first"], ["first"], ["second", "token"], ["head"]]
        model, x = wrap(Transformer, stages).eval(), images()
        assert model.feature_shapes(*SIZE) == [(12, 4, 4), (12, 4, 4), (6,)]
        with torch.no_grad():
            features, logits = model.features(x)
            tokens = model.stages()[0][0](x)
            assert torch.equal(features[0][:, :6].flatten(2), tokens[:, 1:].transpose(1, 2))
            assert torch.equal(features[0][:, 6:], tokens[:, 0, :, None, None].expand(-1, -1, 4, 4))
            for k, feature in enumerate(features):
                torch.testing.assert_close(model.run(feature, start=k + 1), logits)
                assert torch.equal(model.run(x, stop=k + 1), feature)

    def test_maps_with_channels_at_the_end_become_maps(self):
        model, x = wrap(ChannelsAtTheEnd, [["stem", "move"], ["norm", "back", "pool"], ["fc"]]).eval(), images()
        assert model.feature_shapes(*SIZE) == [(6, 8, 8), (6,)]
        with torch.no_grad():
            feature = model.run(x, stop=1)
            assert torch.equal(feature, model.stem(x))
            assert torch.equal(model.run(feature, start=1), model(x))

    @pytest.mark.parametrize(
        ("shape", "size", "prefix", "expected"),
        [
            ((17, 8), (64, 64), None, Tokens(1, 4, 4)),
            ((21, 8), (64, 64), None, Tokens(5, 4, 4)),
            ((9, 8), (64, 64), 5, Tokens(5, 2, 2)),
            ((9, 8), (64, 64), None, Tokens(0, 3, 3)),
            ((33, 8), (64, 128), None, Tokens(1, 4, 8)),
            ((16, 16, 96), (64, 64), None, ChannelsLast()),
            ((4, 8, 96), (64, 128), None, ChannelsLast()),
            ((96, 16, 16), (64, 64), None, None),
            ((16, 16, 16), (64, 64), None, None),
            ((8,), (64, 64), None, None),
        ],
    )
    def test_the_rule(self, shape, size, prefix, expected):
        assert find_layout(shape, size, prefix) == expected

    def test_a_feature_that_is_no_map_is_no_end_of_a_stage(self):
        with pytest.raises(ValueError, match=r"\(25, 8\), neither a vector nor a map nor tokens"):
            find_layout((25, 8), (64, 64), prefix=1)
        stages = [["patches", "flatten"], ["nothing"], ["head"]]
        assert "there is no 'nothing'" in complaint(Transformer, stages)


class TestWrapped:
    def test_every_cut_gives_the_logits_of_forward(self):
        model, x = wrap(Unchained, UNCHAINED_STAGES).eval(), images()
        with torch.no_grad():
            features, logits = model.features(x)
            assert torch.equal(logits, model(x))
            for index, feature in enumerate(features):
                assert torch.equal(model.run(feature, start=index + 1), logits)

    def test_no_part_overwrites_its_input_any_more(self):
        model = wrap(Chain)
        assert not any(getattr(module, "inplace", False) for module in model.modules())

    def test_root_tensors_and_parts_with_two_names_keep_their_keys(self):
        original = WithRootTensors(10)
        model = wrap(WithRootTensors, [["stem"], ["down"], ["pool", "flatten"], ["head"]])
        assert list(model.state_dict()) == list(original.state_dict())
        assert [name for name, _ in model.named_buffers()] == [name for name, _ in original.named_buffers()]
        assert len(list(model.parameters())) == len(list(original.parameters()))

    @pytest.mark.parametrize("path", [f"{__name__}.Chain", "torchvision.models.mobilenet_v2"])
    def test_a_copy_stands_on_its_own(self, path):
        model, x = wrap(path).eval(), images()
        twin = copy.deepcopy(model)
        with torch.no_grad():
            logits = model(x)
            for parameter in model.parameters():
                parameter.zero_()
            assert torch.equal(twin(x), logits)

    def test_a_replaced_part_takes_effect(self):
        model = wrap(Chain).eval()
        model.classifier = nn.Linear(8, 3)
        assert model(images()).shape == (2, 3)

    def test_an_operation_gives_way_to_a_part_of_its_name(self):
        model = wrap(Chain, [["stem"], ["down"], ["pool", "flatten"], ["classifier"]])
        assert model.stages()[2][0] is model.pool

    def test_trains(self):
        model = wrap(Unchained, UNCHAINED_STAGES)
        model(images()).square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestVerification:
    def test_draws_nothing_and_leaves_weights_statistics_and_modes_as_built(self):
        torch.manual_seed(5)
        original = torchvision.models.resnet18(num_classes=10)
        random_state = torch.get_rng_state()
        torch.manual_seed(5)
        wrapped = wrap("torchvision.models.resnet18")
        assert torch.equal(torch.get_rng_state(), random_state)
        assert all(torch.equal(a, b) for a, b in zip(wrapped.state_dict().values(), original.state_dict().values()))
        assert all(module.training for module in wrapped.modules())

    def test_a_missing_step_is_noticed(self):
        text = complaint(Unchained, [["conv1"], ["conv2", "relu"], ["pool"], ["fc"]])
        assert "do not do what the network's own forward does" in text
        assert "evaluation mode" in text

    def test_a_missing_dropout_is_noticed_in_training_mode(self):
        stages = [["stem"], ["down"], ["pool", "flatten"], ["classifier"]]
        assert "training mode" in complaint(FunctionalDropout, stages)

    def test_a_missing_step_is_noticed_behind_a_classifier_of_zeros(self):
        assert "do not do what" in complaint(ZeroHead, [["conv1"], ["conv2"], ["pool"], ["fc"]])
        assert not wrap(ZeroHead, UNCHAINED_STAGES).fc.weight.any()

    def test_an_in_place_operation_on_a_feature_is_noticed(self):
        assert "[twice, pool] overwrites the feature" in complaint(Overwriting, [["conv"], ["twice", "pool"], ["fc"]])
        assert wrap(Overwriting, [["conv", "twice"], ["pool"], ["fc"]])

    @pytest.mark.parametrize("kept_in", [(False, True), (True,)])
    def test_stages_that_train_what_the_network_keeps_as_it_is_are_noticed(self, kept_in):
        text = complaint(KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=kept_in)
        assert "they train conv.bias, conv.weight, down.bias, to which the network's own forward gives no grad" in text
        model = wrap(KeptBody, kept_in=kept_in)
        model(images()).sum().backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
            "fc.weight",
            "fc.bias",
        ]

    def test_a_network_that_is_kept_as_it_is_in_evaluation_mode_or_never_trained_may_be_cut(self):
        assert wrap(KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=(False,))
        assert wrap(NeverTrained).feature_shapes(*SIZE) == wrap(Chain).feature_shapes(*SIZE)

    def test_the_last_feature_must_be_a_vector(self):
        text = complaint(Unchained, [["conv1", "relu"], ["conv2", "relu"], ["pool", "fc"]])
        assert "last feature, before [pool, fc], must be a vector and is a map of shape (8, 14, 14)" in text


@pytest.mark.parametrize("network", [Unchained, plain_sequential, Listed, Whole, "torchvision.models.mobilenet_v2"])
def test_stages_that_do_not_do_are_answered_with_some_that_do_when_they_are_typed(network):
    text = complaint(network, [["pool"], ["flatten"]])
    suggested = text.partition("; stages that do: ")[2]
    config = ModelConfig(name="x", stages=parse_yaml(suggested))
    assert wrap(network, config.stages).feature_shapes(*SIZE) == wrap(network).feature_shapes(*SIZE)


def test_nothing_is_suggested_where_no_stages_do():
    text = complaint(Skip, [["same"], ["conv", "pool"], ["fc"]])
    assert text.endswith("is a step missing or out of order?")


class TestComplaints:
    """Each is one line that names what was found and what would do."""

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            ("nowhere.nets.Net", "cannot import 'nowhere.nets', installed or in this directory: ModuleNotFoundError"),
            ("torchvision.models.resnet43", "'torchvision.models' has no class or function 'resnet43'; it has resnet"),
            ("torchvision.models.resnet18.", "cannot import 'torchvision.models.resnet18'"),
            (".resnet18", "cannot import ''"),
            (f"{__name__}.SIZE", "has no class or function 'SIZE'"),
            ("program_with_net.Net", "cannot import 'program_with_net', installed or in this directory: SystemExit: 0"),
        ],
    )
    def test_about_the_import_path(self, path, expected, tmp_path, monkeypatch):
        (tmp_path / "program_with_net.py").write_text("import sys\nsys.exit(0)\n")
        monkeypatch.syspath_prepend(tmp_path)
        text = complaint(path)
        assert text.startswith(f"model {path!r}: ")
        assert expected in text

    @pytest.mark.parametrize(
        ("network", "kwargs", "expected"),
        [
            (Failing, {}, "calling it with num_classes fails: RuntimeError: no weights here"),
            (Chain, {"depth": 3}, "calling it with num_classes, depth fails: TypeError:"),
            (not_a_module, {}, "calling it gives a int, not a torch.nn.Module"),
            (SevenClasses, {}, "gives shape (4, 7) for 4 images in evaluation mode, not logits of shape (4, 10)"),
            (TwoOutputs, {}, "gives a tuple for 4 images"),
            (Uncopyable, {}, "cannot be copied, as distilling it needs: TypeError: holds a lock"),
        ],
    )
    def test_about_the_callable(self, network, kwargs, expected):
        assert expected in complaint(network, **kwargs)

    def test_about_images_that_the_network_does_not_take(self):
        assert "fails on images of 2x2 in evaluation mode" in complaint(Unchained, UNCHAINED_STAGES, image_size=(2, 2))

    @pytest.mark.parametrize(
        ("stages", "expected"),
        [
            ([["layer1"], ["fc"]], "there is no 'layer1': the network has stem, down, pool, classifier"),
            ([["stem.7"], ["fc"]], "there is no 'stem.7': 'stem' has 0, 1, 2; operations are relu, flatten, pool"),
            ([["stem.1:9:2"], ["fc"]], "'stem.1:9:2' is not a slice"),
            ([["stem.a:b"], ["fc"]], "'stem.a:b' is not a slice"),
            ([["stem.3:4"], ["fc"]], "the slice 'stem.3:4' is empty; the parts are 0, 1, 2"),
            ([["classifier.0:1"], ["fc"]], "'classifier.0:1' slices a Linear, and only a Sequential has slices"),
            ([["0:2"], ["fc"]], "'0:2' slices a Chain"),
            ([], "two or more are needed, each of one or more steps; found with steps: none"),
            ([["stem"], []], "two or more are needed, each of one or more steps; found with steps: 1, 0"),
            ([["down"], ["classifier"]], "'down' fails on a tensor of shape (4, 3, 32, 32): RuntimeError"),
            ([["stem", "down", "pool", "flatten"], ["relu"]], "the last one gives a tensor of shape (4, 8)"),
        ],
    )
    def test_about_the_stages(self, stages, expected):
        text = complaint(Chain, stages)
        assert ": stages: " in text
        assert expected in text

    def test_about_a_step_that_gives_no_tensor(self):
        text = complaint(Recurrent, [["flatten", "rnn"], ["fc"]], image_size=(2, 2))
        assert "'rnn' gives a tuple, and a step must give a tensor" in text


class TestCurrentDirectory:
    SOURCE = """
from torch import nn

def net(num_classes):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))
"""

    def test_a_file_there_can_be_named(self, tmp_path, monkeypatch):
        (tmp_path / "my_nets_of_this_test.py").write_text(self.SOURCE)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
        assert wrap("my_nets_of_this_test.net").feature_shapes(*SIZE) == [(4, 30, 30), (4,)]

    def test_an_error_within_the_file_is_told(self, tmp_path, monkeypatch):
        (tmp_path / "broken_nets_of_this_test.py").write_text("import a_missing_package\n")
        monkeypatch.chdir(tmp_path)
        assert "No module named 'a_missing_package'" in complaint("broken_nets_of_this_test.net")
