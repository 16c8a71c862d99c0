"""Looking into checkpoints, taking networks out of them and bringing in those of others."""

import collections

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from models import get_model
from utils import convert
from utils.command import guarded
from utils.config import Config
from utils.run_folder.checkpoint import load_weights

CLASSES = 7


@pytest.fixture
def network():
    """A network whose every entry differs from a fresh one's."""
    model = get_model("resnet8", CLASSES)
    for value in model.state_dict().values():
        value.add_(1)
    return model


@pytest.fixture
def run(capsys):
    """The command line: exit code, lines of standard output, standard error."""

    def call(*words):
        with pytest.raises(SystemExit) as ending:
            guarded(lambda: convert.main([str(word) for word in words]))
        output = capsys.readouterr()
        return ending.value.code, output.out.splitlines(), output.err

    return call


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def without_counters(weights):
    return {key: value for key, value in weights.items() if not key.endswith(convert.COUNTERS)}


def our_checkpoint(network):
    pair = {"teacher": {"name": "vgg13"}, "student": {"name": "resnet8"}, "selection": "anti"}
    config = {"dataset": {"name": "digits"}, "training": {"epochs": 12}, "kd": pair, "kd_loss": {"name": "at"}}
    return {
        "format": 1,
        "model": network.state_dict(),
        "extra": {"policy.weight": torch.ones(3), "policy.bias": torch.ones(3), "router.to_teacher.0": torch.ones(3)},
        "progress": {"phase": 0, "epoch": 3, "step": 5},
        "val": {"top1": 71.25},
        "best": {"top1": 73.5, "epoch": 2},
        "config": Config.from_dict(config).to_dict(),
    }


def benchmark_checkpoint(network):
    """As the classic CIFAR KD benchmarks write it."""
    return {
        "epoch": 240,
        "model": collections.OrderedDict(without_counters(network.state_dict())),
        "best_acc": np.float64(74.64),
        "accuracy": torch.tensor([74.52]),
        "optimizer": {"state": {}, "param_groups": []},
    }


class TestShow:
    def test_tells_of_our_own_what_run_it_is_and_how_far(self, tmp_path, network, run):
        torch.save(our_checkpoint(network), tmp_path / "last.pth")
        code, lines, _ = run("show", tmp_path / "last.pth")
        rows = dict(line.split(maxsplit=1) for line in lines)
        assert code == 0
        assert rows["kind"] == "checkpoint of a run"
        assert (rows["network"], rows["classes"]) == ("resnet8", str(CLASSES))
        assert rows["run"] == "at, anti, vgg13 -> resnet8 | digits | seed 1029"
        assert rows["progress"] == "3 of 12 epochs, 5 steps"
        assert rows["accuracy"] == "best 73.50% (epoch 2), last 71.25%"
        assert rows["extra"] == "3 entries: policy, router"

    def test_tells_of_others_what_they_hold(self, tmp_path, network, run):
        torch.save(benchmark_checkpoint(network), tmp_path / "ckpt_epoch_240.pth")
        _, lines, _ = run("show", tmp_path / "ckpt_epoch_240.pth")
        rows = dict(line.split(maxsplit=1) for line in lines)
        assert (rows["network"], rows["epoch"], rows["best_acc"]) == ("resnet8", "240", "74.64")
        assert rows["accuracy"].startswith("74.5")
        assert rows["optimizer"] == "dict of 2"

    def test_names_no_network_that_it_does_not_know(self, tmp_path, run):
        torch.save(torch.nn.Linear(3, 4).state_dict(), tmp_path / "w.pth")
        _, lines, _ = run("show", tmp_path / "w.pth")
        assert "network  none of the registered models" in lines
        assert "classes  4" in lines


@pytest.mark.parametrize("name", ["vgg8", "wrn_16_2", "MobileNetV2", "ShuffleV2", "ResNet18"])
def test_networks_are_known_by_their_shapes(name):
    weights = get_model(name, CLASSES).state_dict()
    assert name in convert.matching_models(weights)
    assert convert.count_classes(weights) == CLASSES


class TestExport:
    @pytest.mark.parametrize(
        ("out", "words", "read"),
        [
            ("student.pth", [], lambda path: torch.load(path, weights_only=True)),
            ("student.safetensors", [], safetensors.torch.load_file),
            ("student", ["--format", "safetensors"], safetensors.torch.load_file),
        ],
    )
    def test_writes_the_student_alone(self, tmp_path, network, run, out, words, read):
        torch.save(our_checkpoint(network), tmp_path / "best.pth")
        code, lines, errors = run("export", tmp_path / "best.pth", tmp_path / out, *words)
        assert (code, errors) == (0, "")
        assert lines == [f"{tmp_path / out}: 56 entries of resnet8"]
        assert same(read(tmp_path / out), network.state_dict())

    def test_does_not_write_over_a_file(self, tmp_path, network, run):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        code, _, errors = run("export", tmp_path / "w.pth", tmp_path / "w.pth")
        assert (code, errors) == (
            2,
            f"error: {tmp_path / 'w.pth'}: exists already; name another file or remove it first\n",
        )


class TestImport:
    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda network: network.state_dict(), id="bare"),
            pytest.param(benchmark_checkpoint, id="classic benchmark"),
            pytest.param(our_checkpoint, id="ours"),
            pytest.param(
                lambda network: {"model": {f"module._orig_mod.{k}": v for k, v in network.state_dict().items()}},
                id="wrapped twice",
            ),
        ],
    )
    def test_gives_what_a_teacher_is_loaded_from(self, tmp_path, network, run, wrap):
        torch.save(wrap(network), tmp_path / "theirs.pth")
        code, lines, _ = run("import", tmp_path / "theirs.pth", tmp_path / "ours.pth", "--model", "resnet8")
        assert code == 0
        assert lines == [f"{tmp_path / 'ours.pth'}: resnet8 with 7 classes (every name and shape agrees)"]
        teacher = get_model("resnet8", CLASSES)
        load_weights(teacher, tmp_path / "ours.pth")
        assert same(without_counters(teacher.state_dict()), without_counters(network.state_dict()))

    def test_takes_safetensors(self, tmp_path, network, run):
        safetensors.torch.save_file(network.state_dict(), tmp_path / "w.safetensors")
        assert run("import", tmp_path / "w.safetensors", tmp_path / "ours.pth", "--model", "resnet8")[0] == 0

    def test_takes_torchvision_networks_by_their_import_path(self, tmp_path, run):
        theirs = torchvision.models.resnet18(num_classes=CLASSES)
        torch.save(theirs.state_dict(), tmp_path / "resnet18-f37072fd.pth")
        name = "torchvision.models.resnet18"
        words = ["--model", name, "--image-size", "64"]
        code, _, errors = run("import", tmp_path / "resnet18-f37072fd.pth", tmp_path / "ours.pth", *words)
        assert (code, errors) == (0, "")
        teacher = get_model(name, CLASSES, image_size=(64, 64))
        load_weights(teacher, tmp_path / "ours.pth")
        image = torch.randn(2, 3, 64, 64)
        assert torch.equal(teacher.eval()(image), theirs.eval()(image))

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (
                ["--model", "resnet14"],
                "not the weights of resnet14 with 7 classes: expected 92 entries, the file lacks",
            ),
            (
                ["--model", "resnet8x4"],
                "not the weights of resnet8x4 with 7 classes: expected 62 entries, the file lacks",
            ),
            (["--model", "resnet8", "--num-classes", "9"], "fc.weight has shape (7, 64), expected (9, 64)"),
            (["--model", "resnet9"], "unknown model 'resnet9': did you mean"),
        ],
    )
    def test_refuses_weights_of_another_network(self, tmp_path, network, run, words, complaint):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        code, _, errors = run("import", tmp_path / "w.pth", tmp_path / "ours.pth", *words)
        assert code == 2
        assert complaint in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "ours.pth").exists()

    def test_knows_torchvisions_vgg_by_the_order_of_its_shapes(self):
        with torch.device("meta"):
            theirs, ours = torchvision.models.vgg11_bn().state_dict(), get_model("vgg11-imagenet", 1000)
        renamed = convert.in_order(theirs, ours)
        assert renamed["block0.0.weight"] is theirs["features.0.weight"]
        assert renamed.keys() == without_counters(ours.state_dict()).keys()

    @pytest.mark.slow
    def test_brings_in_torchvisions_vgg_with_the_same_logits(self, tmp_path, run):
        theirs = torchvision.models.vgg11_bn(num_classes=CLASSES)
        torch.save(theirs.state_dict(), tmp_path / "vgg11_bn.pth")
        _, lines, _ = run("import", tmp_path / "vgg11_bn.pth", tmp_path / "ours.pth", "--model", "vgg11-imagenet")
        assert lines[0].endswith("(entry by entry in their order, for the names differ)")
        ours = get_model("vgg11-imagenet", CLASSES)
        load_weights(ours, tmp_path / "ours.pth")
        image = torch.randn(1, 3, 224, 224)
        torch.testing.assert_close(ours.eval()(image), theirs.eval()(image))
