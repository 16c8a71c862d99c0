"""Looking into checkpoints, taking networks out of them and checking those of others."""

import argparse
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
from utils.run_folder.weights import load_weights

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


def our_checkpoint(network):
    pair = {"teacher": {"name": "vgg13"}, "student": {"name": "resnet8"}, "selection": "anti"}
    config = {"dataset": {"name": "digits"}, "training": {"epochs": 12}, "kd": pair, "kd_loss": {"name": "at"}}
    return {
        "format": 1,
        "model": network.state_dict(),
        "ema": {key: value + 1 for key, value in network.state_dict().items()},
        "extra": {"policy.weight": torch.ones(3)},
        "progress": {"phase": 0, "epoch": 3, "step": 5},
        "best": {"top1": 73.5, "epoch": 2},
        "config": Config.from_dict(config).to_dict(),
    }


def benchmark_checkpoint(network):
    """As the classic CIFAR KD benchmarks write it."""
    return {
        "epoch": 240,
        "model": collections.OrderedDict(network.state_dict()),
        "best_acc": np.float64(74.64),
        "optimizer": {"state": {}, "param_groups": []},
        "opt": argparse.Namespace(learning_rate=0.05),
    }


class TestShow:
    def rows(self, run, content, tmp_path):
        torch.save(content, tmp_path / "w.pth")
        code, lines, errors = run("show", tmp_path / "w.pth")
        assert (code, errors) == (0, "")
        return dict(line.split(maxsplit=1) for line in lines if line)

    def test_tells_which_run_a_checkpoint_of_ours_is_of(self, tmp_path, network, run):
        rows = self.rows(run, our_checkpoint(network), tmp_path)
        assert (rows["network"], rows["classes"]) == ("resnet8", str(CLASSES))
        assert rows["run"] == "at, anti, vgg13 -> resnet8 | digits | seed 1029"
        assert rows["progress"] == "{'phase': 0, 'epoch': 3, 'step': 5}"
        assert rows["best"] == "{'top1': 73.5, 'epoch': 2}"

    def test_tells_what_others_hold_and_lists_every_entry(self, tmp_path, network, run):
        rows = self.rows(run, benchmark_checkpoint(network), tmp_path)
        assert (rows["network"], rows["epoch"], rows["best_acc"]) == ("resnet8", "240", "74.64")
        assert (rows["optimizer"], rows["opt"]) == ("dict of 2", "an object with learning_rate")
        assert rows["model.fc.weight"] == "(7, 64) torch.float32"
        assert sum(key.startswith("model.") for key in rows) == len(network.state_dict())

    def test_needs_no_network_that_it_knows(self, tmp_path, run):
        rows = self.rows(run, torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path)
        assert rows["network"] == "none of the registered models"
        assert rows["classes"].startswith("unknown")


@pytest.mark.parametrize("name", ["vgg8", "MobileNetV2"])
def test_networks_are_known_by_their_entries(name, tmp_path):
    weights = get_model(name, CLASSES).state_dict()
    assert convert.count_classes(weights) == CLASSES
    assert name in convert.matching_models(weights, tmp_path, CLASSES)


class TestExport:
    @pytest.mark.parametrize(
        ("out", "read"),
        [("new/folder/student.pth", torch.load), ("student.safetensors", safetensors.torch.load_file)],
    )
    def test_writes_the_student_alone(self, tmp_path, network, run, out, read):
        torch.save(our_checkpoint(network), tmp_path / "best.pth")
        code, lines, errors = run("export", tmp_path / "best.pth", tmp_path / out)
        assert (code, errors) == (0, "")
        assert lines == [f"{tmp_path / out}: 56 entries of resnet8"]
        assert same(read(tmp_path / out), network.state_dict())

    def test_writes_the_moving_average_if_asked(self, tmp_path, network, run):
        torch.save(our_checkpoint(network), tmp_path / "best.pth")
        assert run("export", tmp_path / "best.pth", tmp_path / "out.pth", "--ema")[0] == 0
        assert same(torch.load(tmp_path / "out.pth"), our_checkpoint(network)["ema"])

    def test_writes_views_and_shared_tensors_as_tensors_of_their_own(self, tmp_path, run):
        whole = torch.randn(1000, 1000, 1)
        views = {"a": whole[:2], "b": whole[:2], "c": whole.transpose(0, 1)[:3]}
        torch.save(views, tmp_path / "w.pth")
        for out, read in (("out.safetensors", safetensors.torch.load_file), ("out.pth", torch.load)):
            assert run("export", tmp_path / "w.pth", tmp_path / out)[0] == 0
            assert (tmp_path / out).stat().st_size < 40_000
            assert same(read(tmp_path / out), views)

    @pytest.mark.parametrize(
        ("content", "out", "complaint"),
        [
            ({"a": torch.ones(2)}, "net.onnx", "net.onnx: must end in one of .pth, .pt, .safetensors"),
            ({"a": torch.ones(2)}, "w.pth", "w.pth: exists already; name another file or remove it first"),
            ({"a": torch.ones(2), "b": 3}, "x.pth", "holds no network alone, b is a int"),
            ({"a": torch.ones(2).to_sparse()}, "x.pth", "holds no network alone, a is torch.float32, torch.sparse_coo"),
            ({}, "x.pth", "holds no network, it is empty"),
        ],
    )
    def test_refuses_what_it_cannot_write(self, tmp_path, run, content, out, complaint):
        torch.save(content, tmp_path / "w.pth")
        before = (tmp_path / "w.pth").read_bytes()
        code, _, errors = run("export", tmp_path / "w.pth", tmp_path / out)
        assert (code, errors.count("\n")) == (2, 1)
        assert complaint in errors
        assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
        assert (tmp_path / "w.pth").read_bytes() == before


class TestImport:
    def test_writes_a_checkpoint_of_ours(self, tmp_path, network, run):
        torch.save(benchmark_checkpoint(network), tmp_path / "theirs.pth")
        code, lines, _ = run("import", tmp_path / "theirs.pth", tmp_path / "new/ours.pth", "--model", "resnet8")
        assert code == 0
        assert lines == [f"{tmp_path / 'new/ours.pth'}: resnet8 with 7 classes (56 entries, under model)"]
        teacher = get_model("resnet8", CLASSES)
        load_weights(teacher, tmp_path / "new/ours.pth")
        assert same(teacher.state_dict(), network.state_dict())

    def test_takes_arguments_of_the_model(self, tmp_path, run):
        torch.save(torchvision.models.resnet50(num_classes=7, width_per_group=16).state_dict(), tmp_path / "w")
        words = ["--model", "torchvision.models.resnet50", "--kwargs", "{width_per_group: 16}"]
        assert run("import", tmp_path / "w", tmp_path / "out", *words)[::2] == (0, "")

    def test_leaves_out_what_it_is_told_to(self, tmp_path, network, run):
        extra = {"criterion.weight": torch.ones(3, 5), "fc.scale": torch.ones(1)}
        torch.save({"a": network.state_dict() | extra, "b": network.state_dict()}, tmp_path / "w")
        words = ["import", tmp_path / "w", tmp_path / "out", "--model", "resnet8", "--num-classes", 7]
        assert run(*words, "--prefix", "a")[0] == 2
        assert run(*words, "--prefix", "a", "--drop", "a.criterion", "--drop", "a.fc.scale")[1:] == (
            [f"{tmp_path / 'out'}: resnet8 with 7 classes (56 entries, under a)"],
            "",
        )

    @pytest.mark.parametrize(
        ("words", "complaint"),
        [
            (["--model", "resnet14"], "not the weights of resnet14 with 7 classes: expected 92 entries, the"),
            (["--model", "resnet8", "--num-classes", "9"], "fc.weight has shape (7, 64), expected (9, 64)"),
            (["--model", "resnet9"], "unknown model 'resnet9': did you mean"),
            (["--model", "resnet8", "--kwargs", "{depht: 3}"], "building resnet8 with 7 classes failed: TypeError"),
            (["--model", "resnet8", "--kwargs", "3"], "argument --kwargs: found '3', must be a mapping"),
            (["--model", "resnet8", "--prefix", "net"], "none of those that fit is under 'net'"),
            (["--model", "resnet8", "--drop", "conv"], "no entry is called 'conv', or begins with 'conv.'"),
        ],
    )
    def test_refuses_weights_of_another_network(self, tmp_path, network, run, words, complaint):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        code, _, errors = run("import", tmp_path / "w.pth", tmp_path / "ours.pth", *words)
        assert (code, errors.count("\n")) == (2, 1)
        assert complaint in errors
        assert not (tmp_path / "ours.pth").exists()
