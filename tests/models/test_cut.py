"""Any other network: it stays as it is, and the view beside it is cut where it can be, or as told."""

from __future__ import annotations

import copy
import random
import sys

import odd_networks as odd
import pytest
import torch
import torchvision
from refusals import refusal
from torch import nn

from distillers.spot_adaptive.frozen import follow_numbers, frozen_twin
from models import StagedModel, get_model
from models.cut.trace import logits_of
from models.cut.view import ChannelsLast, Tokens, find_layout
from utils.errors import UserError
from utils.training.average import WeightAverage

SIZE = (32, 32)
UNCHAINED_STAGES = [["conv1", "relu"], ["conv2", "relu"], ["pool"], ["fc"]]
CHAIN_STAGES = [["stem"], ["down"], ["pool", "flatten"], ["classifier"]]


def path_of(network) -> str:
    return network if isinstance(network, str) else f"odd_networks.{network.__name__}"


def wrap(network, stages=None, image_size=SIZE, num_classes=10, **kwargs) -> StagedModel:
    """Wrap an odd network, or whatever a path leads to."""
    return get_model(path_of(network), num_classes, stages=stages, kwargs=kwargs, image_size=image_size)


def images(count: int = 2, size: tuple[int, int] = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, *size)


def check_cuts(view, network, x):
    """The features lead to the logits of the network from everywhere, and nothing overwrites one."""
    with torch.no_grad():
        expected = logits_of(network(x))
        features, logits = view.features(x)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
        for index, feature in enumerate(features):
            kept = feature.clone()
            assert torch.equal(view.run(x, stop=index + 1), feature)
            torch.testing.assert_close(view.run(feature, start=index + 1), expected, rtol=1e-5, atol=1e-6)
            assert torch.equal(feature, kept)


class TestTorchvision:
    @pytest.mark.parametrize(
        ("name", "kwargs", "shapes"),
        [
            ("resnet18", {}, [(64, 16, 16), (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2), (512,)]),
            ("mobilenet_v2", {}, [(16, 32, 32), (24, 16, 16), (32, 8, 8), (96, 4, 4), (1280, 2, 2), (1280,)]),
            (
                "DenseNet",
                {"growth_rate": 4, "block_config": [2, 2, 2, 2], "num_init_features": 8},
                [(8, 32, 32), (16, 16, 16), (16, 8, 8), (16, 4, 4), (16, 2, 2), (16,)],
            ),
        ],
    )
    def test_stays_as_it_is_and_is_cut_at_the_ends_of_its_blocks(self, name, kwargs, shapes):
        original = getattr(torchvision.models, name)(num_classes=10, **kwargs).eval()
        view = wrap(f"torchvision.models.{name}", image_size=(64, 64), **kwargs).eval()
        assert view.feature_shapes(64, 64) == shapes
        assert not view.uncut
        assert list(view.state_dict()) == list(original.state_dict())
        view.load_state_dict(original.state_dict())
        check_cuts(view, original, images(size=(64, 64)))

    def test_slices_and_operations_cut_a_mobilenet(self):
        stages = [["features.0:4"], ["features.4", "features.5:7"], ["features.7:"], ["pool"], ["classifier"]]
        model = wrap("torchvision.models.mobilenet_v2", stages)
        assert model.feature_shapes(64, 64) == [(24, 16, 16), (32, 8, 8), (1280, 2, 2), (1280,)]

    def test_stages_of_a_config_say_the_same_as_the_automatic_cut_which_draws_nothing(self):
        made, states = [], []
        for make in (lambda: odd.Chain(10), lambda: wrap(odd.Chain), lambda: wrap(odd.Chain, CHAIN_STAGES)):
            torch.manual_seed(3)
            made.append(make())
            states.append((torch.get_rng_state().tolist(), random.getstate()))
        assert states[0] == states[1] == states[2]
        original, *views = made
        for view in views:
            assert all(torch.equal(a, b) for a, b in zip(view.state_dict().values(), original.state_dict().values()))
            assert all(module.training for module in view.modules())
        x = images()
        with torch.no_grad():
            features = [view.eval().features(x)[0] for view in views]
        assert all(torch.equal(a, b) for a, b in zip(*features, strict=True))


AUTOMATIC = [
    (odd.Chain, [(4, 32, 32), (8, 16, 16), (8,)]),
    (odd.Answer, [(10,)]),
    (odd.Auxiliary, [(4, 32, 32), (8, 16, 16), (8,)]),
    (odd.perceptron, [(16,)]),
    (odd.Unchained, [(4, 30, 30), (8, 14, 14), (8,)]),
    (odd.Listed, [(4, 32, 32), (4, 16, 16), (4,)]),
    (odd.Whole, [(4, 32, 32), (8, 16, 16), (8,)]),
    (odd.WithRootTensors, [(4, 32, 32), (8, 16, 16), (8,)]),
    (odd.PoolingClassifier, [(4, 32, 32), (4,)]),
    (odd.Skip, [(3, 32, 32), (4, 30, 30), (4,)]),
    (odd.FunctionalMaxPool, [(4, 32, 32), (1024,)]),
    (odd.TwoInputs, [(10,)]),
    (odd.ConvolutionalClassifier, [(10, 30, 30), (10,)]),
    (odd.KeptBody, [(4, 30, 30), (4, 14, 14), (4,)]),
    (odd.FunctionalDropout, [(4, 32, 32), (8, 16, 16), (8,)]),
    (odd.DroppedInPlace, [(4, 30, 30), (4,)]),
    (odd.Preactivated, [(4, 30, 30), (4, 15, 15), (8, 7, 7), (8,)]),
    (odd.Transformer, [(6, 4, 4), (12, 4, 4), (6,)]),
    (odd.ChannelsAtTheEnd, [(6, 8, 8), (6,)]),
    (odd.DecidingWithin, [(4, 4, 4), (8, 2, 2), (8,)]),
    (odd.OddNames, [(4, 32, 32), (4, 16, 16), (8, 8, 8), (8,)]),
    (odd.Deciding, [(8,)]),
    (odd.LayerDrop, [(3,)]),
]


class TestAutomaticCut:
    @pytest.mark.parametrize(("network", "shapes"), AUTOMATIC, ids=lambda value: getattr(value, "__name__", ""))
    def test_gives_the_last_map_of_each_resolution_and_the_vector_and_is_exact(self, network, shapes):
        view = wrap(network)
        assert view.feature_shapes(*SIZE) == shapes
        original = network(10)
        assert len(list(view.buffers())) == len(list(original.buffers()))  # some have no key
        assert list(view.state_dict()) == list(original.state_dict())
        original.load_state_dict(view.state_dict())
        check_cuts(view.eval(), original.eval(), images())
        twin = copy.deepcopy(view).train()  # stands on its own
        for parameter in view.parameters():
            parameter.data.zero_()
        x, logits = images(4), []
        for forward in (lambda x: logits_of(original.train()(x)), lambda x: twin.features(x)[1]):
            torch.manual_seed(0)
            random.seed(0)
            logits.append(forward(x))
        torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-5)

    def test_a_staged_model_of_the_user_is_taken_as_it_is(self):
        assert wrap(odd.Own).feature_shapes(*SIZE) == [(4, 30, 30), (4,)]
        assert "leave `stages` out" in refusal(wrap, odd.Own, [["conv"], ["pool"], ["fc"]])

    def test_what_torch_fx_cannot_follow_is_body_and_classifier_or_one_piece_and_says_why(self):
        deciding, two_inputs = wrap(odd.Deciding), wrap(odd.TwoInputs)
        assert "torch.fx cannot follow its forward (TraceError: symbolically traced" in deciding.uncut
        assert "draws random numbers" in wrap(odd.LayerDrop).uncut
        assert "one map" in two_inputs.uncut
        assert (deciding.one_piece, two_inputs.one_piece) == (False, True)
        all_but_the_classifier = list(deciding.network.parameters())[:-2]
        assert [*map(id, deciding.parameters_until(1))] == [*map(id, all_but_the_classifier)]

    @pytest.mark.parametrize("kept_in", [(False, True), (True,), (False,)])
    def test_what_forward_computes_without_gradients_is_not_trained(self, kept_in):
        model = wrap(odd.KeptBody, kept_in=kept_in)
        model.features(images())[1].sum().backward()
        trained = {name.removeprefix("network.") for name, p in model.named_parameters() if p.grad is not None}
        body = {"conv.weight", "conv.bias", "down.weight", "down.bias"}
        assert trained == {"fc.weight", "fc.bias"} | (set() if True in kept_in else body)


class TestLayouts:
    def test_tokens_become_a_map_whose_first_tokens_are_repeated_everywhere(self):
        stages = [["before first"], ["first"], ["second", "token"], ["head"]]
        model, x = wrap(odd.Transformer, stages).eval(), images()
        assert model.feature_shapes(*SIZE) == [(12, 4, 4), (12, 4, 4), (6,)]
        with torch.no_grad():
            feature, tokens = model.features(x)[0][0], model.run_stage(0, x)
        assert torch.equal(feature[:, :6].flatten(2), tokens[:, 1:].transpose(1, 2))
        assert torch.equal(feature[:, 6:], tokens[:, 0, :, None, None].expand(-1, -1, 4, 4))
        check_cuts(model, model.network, x)

    def test_maps_with_channels_at_the_end_become_maps(self):
        model, x = wrap(odd.ChannelsAtTheEnd, [["stem", "move"], ["norm", "back", "pool"], ["fc"]]).eval(), images()
        with torch.no_grad():
            assert torch.equal(model.run(x, stop=1), model.network.stem(x))
        check_cuts(model, model.network, x)

    @pytest.mark.parametrize(
        ("shape", "size", "prefix", "expected"),
        [
            ((17, 8), (64, 64), None, Tokens(1, 4, 4)),
            ((9, 8), (64, 64), 5, Tokens(5, 2, 2)),
            ((33, 8), (64, 128), None, Tokens(1, 4, 8)),
            ((16, 16, 96), (64, 64), None, ChannelsLast()),
            ((96, 16, 16), (64, 64), None, None),
            ((16, 16, 16), (64, 64), None, None),
        ],
    )
    def test_the_rule(self, shape, size, prefix, expected):
        assert find_layout(shape, size, prefix) == expected

    def test_other_shapes_have_none(self):
        with pytest.raises(UserError, match=r"\(25, 8\) is no vector, map or tokens"):
            find_layout((25, 8), (64, 64), prefix=1)


class TestView:
    def test_a_network_keeps_its_own_modes_and_names(self):
        view = nn.ModuleList([wrap(odd.OddNames)]).train()[0]
        assert view.network.training
        assert not view.network.run.training
        before = view.network.run.running_mean.clone()
        view.features(images())
        assert torch.equal(view.network.run.running_mean, before)
        assert isinstance(view.network.stages, nn.Conv2d)
        assert view.network.shapes.inplace

    def test_weights_go_in_and_out_under_the_networks_names_within_a_larger_module_too(self):
        model, other = (nn.ModuleDict({"student": wrap(odd.Chain)}) for _ in range(2))
        assert list(model.state_dict()) == [f"student.{key}" for key in odd.Chain(10).state_dict()]
        other.load_state_dict(model.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
        with pytest.raises(RuntimeError, match="Missing key"):
            other.load_state_dict({})

    def test_versions_that_a_network_asks_for_are_those_of_today(self):
        model = wrap("torchvision.models.mnasnet0_5")
        model.load_state_dict(dict(model.state_dict()))

    def test_what_is_replaced_or_moved_later_takes_effect_in_the_stages(self):
        model = wrap(odd.Chain).eval()
        model.network.classifier = nn.Linear(8, 3)
        assert model.features(images())[1].shape == (2, 3)
        assert model.double().features(images().double())[0][0].dtype == torch.float64
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
        assert isinstance(converted.network.stem[1], nn.SyncBatchNorm)

    def test_the_tensors_of_a_stage_are_those_that_it_uses(self):
        model = wrap(odd.Unchained)
        assert [*map(id, model.parameters_until(1))] == [*map(id, model.network.conv1.parameters())]
        assert {*map(id, model.stage_tensors(-1))} == {*map(id, model.network.fc.parameters())}


class TestNumbersThatChange:
    def test_stages_follow_a_number_that_the_user_changes(self):
        view, x = wrap(odd.Scheduled).eval(), images()
        for scale in (1.0, 5.0, 0.5):
            view.network.scale = scale
            check_cuts(view, view.network, x)
        twin = frozen_twin(view)
        view.network.scale = 2.0
        assert torch.equal(twin(x), 0.25 * view(x))
        follow_numbers(twin, view)
        assert torch.equal(twin.features(x)[1], view(x))

    def test_a_number_by_which_a_stage_is_gone_is_one_line(self):
        view = wrap(odd.Scheduled)
        view.network.is_deep = False
        with pytest.raises(UserError, match=r"following its forward again, .*: a stage does not end where it did"):
            view.features(images())

    def test_a_forward_that_counts_its_steps_is_called_itself(self):
        view, x = wrap(odd.Counting), images()
        assert "its forward changes its attribute 'steps'" in view.uncut
        view.train()
        for _ in range(3):
            view.features(x)
        assert view.network.steps == 3
        check_cuts(view.eval(), view.network, x)


class TestGivenStages:
    def test_train(self):
        model = wrap(odd.Unchained, UNCHAINED_STAGES)
        model.features(images())[1].square().sum().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())

    def test_what_comes_before_a_part_may_be_the_first_step(self):
        model = wrap(odd.Skip, [["before conv"], ["conv", "pool"], ["fc"]])
        assert model.feature_shapes(*SIZE) == [(3, 32, 32), (4,)]
        assert model.parameters_until(1) == list(model.network.same.parameters())
        assert "does not call 'unused' with one tensor" in refusal(wrap, odd.Listed, [["before unused"], ["fc"]])
        assert "finding 'nowhere' failed" in refusal(wrap, odd.Skip, [["before nowhere"], ["fc"]])

    def test_an_operation_gives_way_to_a_part_of_its_name(self):
        assert wrap(odd.Chain, CHAIN_STAGES).pieces[False][2].names == {"pool"}

    def test_a_feature_that_the_next_stage_overwrites_is_kept(self):
        model = wrap(odd.DroppedInPlace, [["conv", "norm"], ["pool"], ["fc"]])
        (_, vector), _ = model.features(images())
        assert vector.all()

    @pytest.mark.parametrize("kept_in", [(False, True), (True,)])
    def test_that_train_what_the_network_keeps_as_it_is_are_noticed(self, kept_in):
        text = refusal(wrap, odd.KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=kept_in)
        assert "they train conv.bias, conv.weight, down.bias, to which the network's own forward gives no grad" in text

    def test_a_network_that_is_kept_as_it_is_in_evaluation_mode_or_never_trained_may_be_cut(self):
        assert wrap(odd.KeptBody, [["conv"], ["down"], ["pool"], ["fc"]], kept_in=(False,))
        assert wrap(odd.NeverTrained, CHAIN_STAGES)

    @pytest.mark.parametrize(
        ("network", "stages", "expected"),
        [
            (odd.Chain, [["stem.7"], ["fc"]], "finding 'stem.7', which is no operation (relu, flatten, pool, token)"),
            (odd.Chain, [["stem.a:b"], ["fc"]], "finding 'stem.a:b', which is no operation (relu, flatten, pool"),
            (odd.Chain, [["stem"], []], "two or more are needed, each of one or more steps"),
            (odd.Chain, [["down"], ["classifier"]], "stage 0 on (2, 3, 32, 32) failed: RuntimeError"),
            (odd.Chain, [["stem", "down", "pool", "flatten"], ["relu"]], "logits differ by up to inf"),
            (odd.Unchained, [["conv1"], ["conv2", "relu"], ["pool"], ["fc"]], "in evaluation mode logits differ"),
            (odd.FunctionalDropout, CHAIN_STAGES, "in training mode logits differ"),
            (odd.ZeroHead, [["conv1"], ["conv2"], ["pool"], ["fc"]], "they do not do what the network's own forward"),
            (odd.Unchained, [["conv1"], ["conv2"], ["pool", "fc"]], "must be a vector and has shape (8, 14, 14)"),
        ],
    )
    def test_that_do_not_fit_are_refused_in_one_line(self, network, stages, expected):
        text = refusal(wrap, network, stages)
        assert ": stages: " in text
        assert expected in text

    def test_a_classifier_of_zeros_stays_zero(self):
        assert not wrap(odd.ZeroHead, UNCHAINED_STAGES).network.fc.weight.any()


def test_weights_that_are_computed_from_others_follow_them():
    view = wrap(odd.WeightNormed)
    twin, average = frozen_twin(view), WeightAverage(view, 0.5).network
    with torch.no_grad():
        view.network.down[1].weight_g.mul_(2)
    x = images()
    assert torch.equal(twin(x), view.eval()(x))
    assert not torch.equal(average(x), view(x))
    check_cuts(view, view.network, x)


def test_probabilities_are_one_line(caplog):
    wrap(odd.Probabilities)
    assert "network Probabilities: its outputs are probabilities, expected logits" in caplog.text


class TestComplaints:
    """Each is one line that names what was found and what would do."""

    @pytest.mark.parametrize(
        ("network", "kwargs", "expected"),
        [
            ("nowhere.nets.Net", {}, "importing 'nowhere.nets', installed or in this directory, failed: Module"),
            ("torchvision.models.resnet43", {}, "has no class or function 'resnet43': did you mean 'resnet"),
            ("odd_networks.__file__", {}, "has no class or function '__file__'"),
            ("program_with_net.Net", {}, "importing 'program_with_net', installed or in this directory, failed: Sys"),
            (odd.Failing, {}, "calling it with num_classes failed: RuntimeError: no weights here"),
            (odd.Chain, {"depth": 3}, "calling it with num_classes, depth failed: TypeError"),
            (odd.not_a_module, {}, "calling it gives a int, not a torch.nn.Module"),
            (odd.Exits, {}, "gives list for 2 images in evaluation mode, not logits of (2, 10); let"),
            (odd.SevenClasses, {}, "gives (2, 7) for 2 images in evaluation mode, not logits of (2, 10); let"),
            (odd.Squeezed, {}, "gives (10,) for a single image, not a row of logits; does a squee"),
            (odd.Uncopyable, {}, "copying it failed: TypeError: holds a lock"),
            (odd.Unchained, {"image_size": (2, 2)}, "running it on images of 2x2 in evaluation mode failed: RuntimeE"),
        ],
    )
    def test_about_what_a_path_leads_to(self, network, kwargs, expected, tmp_path, monkeypatch):
        (tmp_path / "program_with_net.py").write_text("import sys\nsys.exit(0)\n")
        monkeypatch.syspath_prepend(tmp_path)
        text = refusal(wrap, network, **kwargs)
        assert text.startswith(f"model {path_of(network)!r}: ")
        assert expected in text

    def test_a_file_in_the_current_directory_can_be_named(self, tmp_path, monkeypatch):
        (tmp_path / "my_nets_of_this_test.py").write_text("from odd_networks import Unchained as Net\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
        assert wrap("my_nets_of_this_test.Net").feature_shapes(*SIZE)[-1] == (8,)
