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
from utils.run_folder.checkpoint import read_checkpoint
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


@pytest.fixture
def ours(trained_run):
    """A checkpoint of a run, with a moving average."""
    content = read_checkpoint(trained_run / "ckpt/best.pth")
    return content | {"ema": {key: value + 1 for key, value in content["model"].items()}}


def benchmark_checkpoint(network):
    """As the classic CIFAR KD benchmarks write it."""
    return {
        "epoch": 240,
        "model": collections.OrderedDict(network.state_dict()),
        "best_acc": np.float64(74.64),
        "optimizer": {"state": {}, "param_groups": []},
        "opt": argparse.Namespace(learning_rate=0.05),
    }


def test_show_tells_what_a_checkpoint_holds(tmp_path, ours, network, run):
    def rows(content):
        torch.save(content, tmp_path / "w.pth")
        code, lines, errors = run("show", tmp_path / "w.pth")
        assert (code, errors) == (0, "")
        return dict(line.split(maxsplit=1) for line in lines if line)

    shown = rows(ours)
    assert (shown["run"], shown["classes"]) == ("sp, adaptive, resnet8 -> resnet8 | digits | seed 1029", "10")
    assert shown["progress"] == "{'phase': 0, 'epoch': 1, 'step': 0}"
    theirs = rows(benchmark_checkpoint(network))
    assert (theirs["network"], theirs["epoch"], theirs["best_acc"]) == ("resnet8", "240", "74.64")
    assert (theirs["optimizer"], theirs["opt"]) == ("dict of 2", "an object with learning_rate")
    assert theirs["model.fc.weight"] == "(7, 64) torch.float32"
    assert sum(key.startswith("model.") for key in theirs) == len(network.state_dict())
    foreign = rows(torch.nn.Conv2d(3, 4, 1).state_dict())
    assert (foreign["network"], foreign["classes"][:7]) == ("none of the registered models", "unknown")


class TestExport:
    @pytest.mark.parametrize(
        ("out", "read", "words", "key"),
        [
            ("new/folder/student.pth", torch.load, [], "model"),
            ("student.safetensors", safetensors.torch.load_file, ["--ema"], "ema"),
        ],
    )
    def test_writes_the_student_alone_or_its_moving_average(self, tmp_path, ours, run, out, read, words, key):
        torch.save(ours, tmp_path / "best.pth")
        code, lines, errors = run("export", tmp_path / "best.pth", tmp_path / out, *words)
        assert (code, lines, errors) == (0, [f"{tmp_path / out}: 56 entries"], "")
        assert same(read(tmp_path / out), ours[key])

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
        out = tmp_path / "new/ours.pth"
        code, lines, _ = run("import", tmp_path / "theirs.pth", out, "--model", "resnet8")
        assert (code, lines) == (0, [f"{out}: resnet8 with 7 classes (56 entries, under model)"])
        teacher = get_model("resnet8", CLASSES)
        load_weights(teacher, out)
        assert same(teacher.state_dict(), network.state_dict())

    def test_takes_arguments_of_the_model(self, tmp_path, run):
        torch.save(torchvision.models.mobilenet_v2(num_classes=7, width_mult=0.35).state_dict(), tmp_path / "w")
        words = ["--model", "torchvision.models.mobilenet_v2", "--kwargs", "{width_mult: 0.35}"]
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
            (["--model", "resnet8", "--num-classes", "9"], "fc.weight has shape (7, 64), expected (9, 64)"),
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
