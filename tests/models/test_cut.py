"""Any other network: it stays as it is, and the view beside it is cut where it can be, or as told."""

from __future__ import annotations

import copy
import random
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from models import StagedModel, get_model, wrap_model
from models.cut.layout import ChannelsLast, Tokens, find_layout
from models.staged import global_pool
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


class LayerDrop(nn.Module):
    """Leaves a layer out at random, drawn by Python."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, num_classes)

    def forward(self, x):
        x = self.conv(x) if not self.training or random.random() < 0.5 else x
        return self.fc(x.mean(dim=(2, 3)))


class FrozenStem(Chain):
    """Its `train` keeps the first BatchNorm as it is."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.stem[1].eval()
        return self


class OddNames(nn.Module):
    """Submodules called as what a view has."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features, self.stages = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 2, 2)
        self.run, self.step = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 2, 2)
        self.shapes, self.forward_features = nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.network, self.pieces = nn.Flatten(), nn.Linear(8, num_classes)

    def forward(self, x):
        x = self.step(self.run(self.stages(self.features(x))))
        return self.pieces(self.network(self.forward_features(self.shapes(x))))


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


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "shapes"),
        [
            ("resnet18", [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,)]),
            ("mobilenet_v2", [(16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (1280, 2, 2), (1280,)]),
            ("mobilenet_v3_small", [(16, 32, 32), (16, 16, 16), (24, 8, 8), (48, 4, 4), (576, 2, 2), (576,)]),
            ("densenet121", [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (1024, 2, 2), (1024,)]),
        ],
    )
    def test_stays_as_it_is_and_is_cut_at_the_ends_of_its_blocks(self, name, shapes):
        original = getattr(torchvision.models, name)(num_classes=10).eval()
        wrapped = wrap(f"torchvision.models.{name}", image_size=(64, 64)).eval()
        assert wrapped.feature_shapes(64, 64) == shapes
        assert not wrapped.uncut
        assert list(wrapped.state_dict()) == list(original.state_dict())
        wrapped.load_state_dict(original.state_dict())
        check_cuts(wrapped, original, images(size=(64, 64)))

    def test_stages_of_a_config_say_the_same_as_the_automatic_cut(self):
        torch.manual_seed(3)
        automatic = wrap("torchvision.models.resnet18").eval()
        torch.manual_seed(3)
        explicit = wrap("torchvision.models.resnet18", RESNET_STAGES).eval()
        x = images()
        with torch.no_grad():
            assert all(
                torch.equal(a, b) for a, b in zip(explicit.features(x)[0], automatic.features(x)[0], strict=True)
            )

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
        assert not model.network.layer1[0].bn2.weight.any()


def check_cuts(view, network, x):
    """The features lead to the logits of the network from everywhere, and nothing overwrites one."""
    with torch.no_grad():
        expected = network(x)
        features, logits = view.features(x)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        for index, feature in enumerate(features):
            kept = feature.clone()
            assert torch.equal(view.run(x, stop=index + 1), feature)
            torch.testing.assert_close(view.run(feature, start=index + 1), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(feature, kept)


AUTOMATIC = [
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
    (Skip, [(3, 32, 32), (4, 30, 30), (4,)]),
    (NestedSkip, [(3, 32, 32), (4, 30, 30), (4,)]),
    (SkipOverAll, [(10, 30, 30), (10,)]),
    (SkipWithin, [(8, 32, 32), (4, 16, 16), (4,)]),
    (PreNormalised, [(4, 30, 30), (8, 14, 14), (8,)]),
    (FunctionalMaxPool, [(4, 32, 32), (1024,)]),
    (TwoInputs, [(10,)]),
    (ConvolutionalClassifier, [(10, 30, 30), (10,)]),
    (KeptBody, [(4, 30, 30), (4, 14, 14), (4,)]),
    (NeverTrained, [(4, 32, 32), (8, 16, 16), (8,)]),
    (FunctionalDropout, [(4, 32, 32), (8, 16, 16), (8,)]),
    (Overwriting, [(4, 30, 30), (4,)]),
    (Preactivated, [(4, 30, 30), (4, 15, 15), (8, 7, 7), (8,)]),
    (Transformer, [(6, 4, 4), (12, 4, 4), (6,)]),
    (ChannelsAtTheEnd, [(6, 8, 8), (6,)]),
    (DecidingWithin, [(4, 4, 4), (8, 2, 2), (8,)]),
    (OddNames, [(4, 32, 32), (4, 16, 16), (8, 8, 8), (8,)]),
    (Deciding, [(8,)]),
    (LayerDrop, [(3,)]),
]


class TestAutomaticCut:
    @pytest.mark.parametrize(("network", "shapes"), AUTOMATIC, ids=lambda value: getattr(value, "__name__", ""))
    def test_gives_the_last_map_of_each_resolution_and_the_vector_and_is_exact(self, network, shapes):
        view = wrap(network)
        assert view.feature_shapes(*SIZE) == shapes
        original = network(10)
        original.load_state_dict(view.state_dict())
        check_cuts(view.eval(), original.eval(), images())
        twin = copy.deepcopy(view).train()  # stands on its own
        for parameter in view.parameters():
            parameter.data.zero_()
        torch.manual_seed(0)
        random.seed(0)
        expected = original.train()(x := images(4))
        torch.manual_seed(0)
        random.seed(0)
        images(4)
        torch.testing.assert_close(twin.features(x)[1], expected, rtol=1e-3, atol=1e-5)

    def test_a_staged_model_of_the_user_is_taken_as_it_is(self):
        assert wrap(Own).feature_shapes(*SIZE) == [(4, 30, 30), (4,)]
        assert "leave `stages` out" in complaint(Own, [["conv"], ["pool"], ["fc"]])

    def test_what_torch_fx_cannot_follow_is_body_and_classifier_or_one_piece_and_says_why(self):
        assert "torch.fx cannot follow its forward (TraceError: symbolically traced" in wrap(Deciding).uncut
        assert "draws random numbers" in wrap(LayerDrop).uncut
        assert (
            len(wrap(Deciding).parameters_until(1)) == len(list(Chain(10).parameters())) - 2
        )  # all but the classifier
        assert "one map" in wrap(TwoInputs).uncut
        assert wrap(TwoInputs).one_piece
        assert not wrap(Deciding).one_piece

    def test_a_dropout_called_as_a_function_drops_in_training_mode_alone(self):
        model = wrap(FunctionalDropout)
        x = torch.ones(1, 3, *SIZE)
        assert len({model.features(x)[1].sum().item() for _ in range(9)}) > 1
        assert len({model.eval().features(x)[1].sum().item() for _ in range(9)}) == 1

    @pytest.mark.parametrize("kept_in", [(False, True), (True,), (False,)])
    def test_what_forward_computes_without_gradients_is_not_trained(self, kept_in):
        model = wrap(KeptBody, kept_in=kept_in)
        model.features(images())[1].sum().backward()
        trained = {name.removeprefix("network.") for name, p in model.named_parameters() if p.grad is not None}
        body = {"conv.weight", "conv.bias", "down.weight", "down.bias"}
        assert trained == {"fc.weight", "fc.bias"} | (set() if True in kept_in else body)

    def test_what_comes_before_a_part_may_be_named_as_the_first_step(self):
        model = wrap(Skip, [["before conv"], ["conv", "pool"], ["fc"]])
        assert model.feature_shapes(*SIZE) == [(3, 32, 32), (4,)]
        assert model.parameters_until(1) == list(model.network.same.parameters())
        assert "forward does not call 'unused' with one tensor" in complaint(Listed, [["before unused"], ["fc"]])
        assert "there is no 'nowhere'" in complaint(Skip, [["before nowhere"], ["fc"]])


class TestLayouts:
    def test_tokens_become_a_map_whose_first_tokens_are_repeated_everywhere(self):
        stages = [["before first"], ["first"], ["second", "token"], ["head"]]
        model, x = wrap(Transformer, stages).eval(), images()
        assert model.feature_shapes(*SIZE) == [(12, 4, 4), (12, 4, 4), (6,)]
        with torch.no_grad():
            features, logits = model.features(x)
            tokens = model.run_stage(0, x)
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
            assert torch.equal(feature, model.network.stem(x))
            torch.testing.assert_close(model.run(feature, start=1), model(x))

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


class TestView:
    def test_a_network_keeps_its_own_modes_and_names(self):
        frozen = wrap(FrozenStem).train()
        assert frozen.network.training
        assert not frozen.network.stem[1].training
        assert not nn.ModuleList([frozen]).train()[0].network.stem[1].training
        before = frozen.network.stem[1].running_mean.clone()
        frozen.features(images())
        assert torch.equal(frozen.network.stem[1].running_mean, before)
        assert isinstance(wrap(OddNames).network.stages, nn.Conv2d)
        assert any(module.inplace for module in wrap(Chain).modules() if isinstance(module, nn.ReLU))

    def test_root_tensors_and_parts_with_two_names_keep_their_keys(self):
        original = WithRootTensors(10)
        model = wrap(WithRootTensors)
        assert list(model.state_dict()) == list(original.state_dict())
        assert len(list(model.buffers())) == len(list(original.buffers()))
        assert len(list(model.parameters())) == len(list(original.parameters()))

    def test_weights_go_in_and_out_under_the_networks_names_within_a_larger_module_too(self):
        model, other = (nn.ModuleDict({"student": wrap(Chain)}) for _ in range(2))
        assert list(model.state_dict()) == [f"student.{key}" for key in Chain(10).state_dict()]
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})

    def test_versions_that_a_network_asks_for_are_those_of_today(self):
        model = wrap("torchvision.models.mnasnet0_5")
        model.load_state_dict(dict(model.state_dict()))

    def test_what_is_replaced_or_moved_later_takes_effect_in_the_stages(self):
        model = wrap(Chain).eval()
        model.network.classifier = nn.Linear(8, 3)
        assert model.features(images())[1].shape == (2, 3)
        assert model.features(images())[0][0].dtype == torch.float32
        assert model.double().features(images().double())[0][0].dtype == torch.float64
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert isinstance(converted.network.stem[1], nn.SyncBatchNorm)

    def test_the_tensors_of_a_stage_are_those_that_it_uses(self):
        model = wrap(Unchained)
        assert [*map(id, model.parameters_until(1))] == [*map(id, model.network.conv1.parameters())]
        assert {*map(id, model.stage_tensors(-1))} == {*map(id, model.network.fc.parameters())}

    def test_an_operation_gives_way_to_a_part_of_its_name(self):
        model = wrap(Chain, [["stem"], ["down"], ["pool", "flatten"], ["classifier"]])
        assert model.pieces[False][2].names == {"pool"}

    def test_trains(self):
        model = wrap(Unchained, UNCHAINED_STAGES)
        model.features(images())[1].square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


class TestTrial:
    def test_draws_nothing_and_leaves_weights_statistics_and_modes_as_built(self):
        torch.manual_seed(5)
        original = torchvision.models.resnet18(num_classes=10)
        random_states = torch.get_rng_state(), random.getstate()
        torch.manual_seed(5)
        wrapped = wrap("torchvision.models.resnet18")
        assert torch.equal(torch.get_rng_state(), random_states[0])
        wrap(LayerDrop)
        assert random.getstate() == random_states[1]
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
        assert not wrap(ZeroHead, UNCHAINED_STAGES).network.fc.weight.any()

    def test_a_feature_that_the_next_stage_overwrites_is_kept(self):
        model = wrap(Overwriting, [["conv"], ["twice", "pool"], ["fc"]]).eval()
        check_cuts(model, model.network, images())

    @pytest.mark.parametrize("kept_in", [(False, True), (True,)])
    def test_stages_that_train_what_the_network_keeps_as_it_is_are_noticed(self, kept_in):
        text = complaint(KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=kept_in)
        assert "they train conv.bias, conv.weight, down.bias, to which the network's own forward gives no grad" in text

    def test_a_network_that_is_kept_as_it_is_in_evaluation_mode_or_never_trained_may_be_cut(self):
        assert wrap(KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=(False,))
        assert wrap(NeverTrained, [["stem"], ["down"], ["pool", "flatten"], ["classifier"]])

    def test_the_last_feature_must_be_a_vector(self):
        text = complaint(Unchained, [["conv1", "relu"], ["conv2", "relu"], ["pool", "fc"]])
        assert "the last feature, before the classifier, must be a vector and has shape (8, 14, 14)" in text


class TestComplaints:
    """Each is one line that names what was found and what would do."""

    @pytest.mark.parametrize(
        ("path", "expected"),
        [
            (
                "nowhere.nets.Net",
                "importing 'nowhere.nets', installed or in this directory, failed: Module",
            ),
            ("torchvision.models.resnet43", "'torchvision.models' has no class or function 'resnet43'; it has resnet"),
            ("torchvision.models.resnet18.", "importing 'torchvision.models.resnet18'"),
            (".resnet18", "importing ''"),
            (f"{__name__}.SIZE", "has no class or function 'SIZE'"),
            (
                "program_with_net.Net",
                "importing 'program_with_net', installed or in this directory, failed: SystemExit",
            ),
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
            (Failing, {}, "calling it with num_classes failed: RuntimeError: no weights here"),
            (Chain, {"depth": 3}, "calling it with num_classes, depth failed: TypeError:"),
            (not_a_module, {}, "calling it gives a int, not a torch.nn.Module"),
            (SevenClasses, {}, "gives shape (2, 7) for 2 images in evaluation mode, not logits of shape (2, 10)"),
            (TwoOutputs, {}, "gives a tuple for 2 images"),
            (Uncopyable, {}, "copying it, which distilling needs, failed: TypeError: holds a lock"),
        ],
    )
    def test_about_the_callable(self, network, kwargs, expected):
        assert expected in complaint(network, **kwargs)

    def test_about_images_that_the_network_does_not_take(self):
        assert "running it on images of 2x2 in evaluation mode failed: RuntimeError" in complaint(
            Unchained, UNCHAINED_STAGES, image_size=(2, 2)
        )

    @pytest.mark.parametrize(
        ("stages", "expected"),
        [
            ([["layer1"], ["fc"]], "there is no 'layer1': the network has stem, down, pool, classifier"),
            ([["stem.7"], ["fc"]], "there is no 'stem.7': 'stem' has 0, 1, 2; operations are relu, flatten, pool"),
            ([["stem.1:9:2"], ["fc"]], "taking the slice 'stem.1:9:2' of 0, 1, 2 failed: ValueError"),
            ([["stem.a:b"], ["fc"]], "taking the slice 'stem.a:b' of 0, 1, 2 failed: ValueError"),
            ([["stem.3:4"], ["fc"]], "the slice 'stem.3:4' is empty; the parts are 0, 1, 2"),
            ([["classifier.0:1"], ["fc"]], "the slice 'classifier.0:1' is empty; the parts are nothing"),
            ([], "two or more are needed, each of one or more steps; found with steps: none"),
            ([["stem"], []], "two or more are needed, each of one or more steps; found with steps: 1, 0"),
            ([["down"], ["classifier"]], "stage 0 on a tensor of shape (2, 3, 32, 32) failed: RuntimeError"),
            ([["stem", "down", "pool", "flatten"], ["relu"]], "they give logits of shape (2, 8)"),
        ],
    )
    def test_about_the_stages(self, stages, expected):
        text = complaint(Chain, stages)
        assert ": stages: " in text
        assert expected in text

    def test_about_a_step_that_gives_no_tensor(self):
        text = complaint(Recurrent, [["flatten", "rnn"], ["fc"]], image_size=(2, 2))
        assert "stage 0 gives a tuple, not a tensor" in text


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
