"""Looking into checkpoints, taking networks out of them and bringing in those of others."""

import argparse
import collections
import os
import shlex
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision

from models import get_model
from utils import convert
from utils.command import guarded
from utils.config import Config
from utils.errors import UserError
from utils.run_folder.weights import COUNTERS, in_order, load_weights

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
    return {key: value for key, value in weights.items() if not key.endswith(COUNTERS)}


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

    @pytest.mark.parametrize(
        "spoilt",
        [
            {"best": None},
            {"best": {}},
            {"best": {"top1": "x", "epoch": 1}},
            {"val": {}},
            {"progress": 3},
            {"extra": [1]},
        ],
        ids=str,
    )
    def test_leaves_out_what_a_checkpoint_does_not_say(self, tmp_path, network, run, spoilt):
        torch.save(our_checkpoint(network) | spoilt, tmp_path / "last.pth")
        code, lines, errors = run("show", tmp_path / "last.pth")
        assert (code, errors) == (0, "")
        rows = {line.split()[0] for line in lines}
        gone = {"best": "accuracy", "val": "accuracy"}.get(next(iter(spoilt)), next(iter(spoilt)))
        assert {"run", "progress", "accuracy", "extra"} - rows == {gone}

    def test_needs_no_matrix(self, tmp_path, run):
        torch.save(torch.nn.Conv2d(3, 4, 1).state_dict(), tmp_path / "w.pth")
        code, lines, _ = run("show", tmp_path / "w.pth")
        assert code == 0
        assert "classes  unknown, there is no matrix that could be a classifier" in lines

    def test_says_what_it_leaves_out(self, tmp_path, network, run):
        torch.save({"model": network.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "w.pth")
        _, lines, _ = run("show", tmp_path / "w.pth")
        assert "args     an object, left out" in lines

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
            ("new/folder/student.pth", [], lambda path: torch.load(path, weights_only=True)),
            ("student.SAFETENSORS", [], safetensors.torch.load_file),
            ("student", ["--format", "safetensors"], safetensors.torch.load_file),
        ],
    )
    def test_writes_the_student_alone(self, tmp_path, network, run, out, words, read):
        torch.save(our_checkpoint(network), tmp_path / "best.pth")
        code, lines, errors = run("export", tmp_path / "best.pth", tmp_path / out, *words)
        assert (code, errors) == (0, "")
        assert lines == [f"{tmp_path / out}: 56 entries of resnet8"]
        assert same(read(tmp_path / out), network.state_dict())

    def test_writes_views_and_shared_tensors_as_tensors_of_their_own(self, tmp_path, run):
        whole = torch.randn(1000, 1000)
        torch.save({"a": whole[:2], "b": whole[:2], "c": whole.T[:3]}, tmp_path / "w.pth")
        for out in ("out.safetensors", "out.pth"):
            assert run("export", tmp_path / "w.pth", tmp_path / out)[0] == 0
            assert (tmp_path / out).stat().st_size < 40_000
        written = safetensors.torch.load_file(tmp_path / "out.safetensors")
        assert same(written, {"a": whole[:2], "b": whole[:2], "c": whole.T[:3]})

    def test_does_not_write_one_format_under_the_name_of_another(self, tmp_path, network, run):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        code, _, errors = run("export", tmp_path / "w.pth", tmp_path / "net.onnx")
        assert code == 2
        assert "net.onnx: must end in .pth, .pt, .safetensors, or --format says how it is written" in errors
        assert not (tmp_path / "net.onnx").exists()

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
            (["--model", "resnet8", "--num-classes", "0"], "argument --num-classes: found '0', must be a whole number"),
            (["--model", "resnet8", "--num-classes", "-3"], "argument --num-classes: found '-3', must be a whole"),
            (["--model", "resnet8", "--num-classes", "99999999999999"], "argument --num-classes: found '999999"),
            (["--model", "resnet8", "--num-classes", "2147483647"], "out of memory (tried to allocate "),
            (["--model", "torchvision.models.resnet18", "--image-size", "-1"], "argument --image-size: found '-1'"),
            (["--model", "torchvision.models.resnet18", "--image-size", "32x"], "not the weights of torchvision"),
            (["--model", "torchvision.models.resnet18", "--image-size", "9999999"], "out of memory"),
            (["--model", "resnet8", "--kwargs", "3"], "argument --kwargs: found '3', must be a mapping"),
            (["--model", "resnet8", "--kwargs", "[a"], "argument --kwargs: line 1, column 3: expected"),
            (
                ["--model", "torchvision.models.resnet18", "--image-size", "x"],
                "argument --image-size: found 'x', must be",
            ),
            (["--model", "resnet8", "--stages", "[1]"], "argument --stages: found '[1]', must be a list of lists"),
            (["--model", "resnet8", "--stages", "3"], "argument --stages: found '3', must be a list"),
            (["--model", "resnet8", "--prefix", "net."], "no entry begins with 'net.'; they begin with conv1, bn1,"),
            (["--model", "resnet8", "--drop", "conv"], "no entry is called 'conv', or begins with 'conv.'"),
        ],
    )
    def test_refuses_weights_of_another_network(self, tmp_path, network, run, words, complaint):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        code, _, errors = run("import", tmp_path / "w.pth", tmp_path / "ours.pth", *words)
        assert code == 2
        assert complaint in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "ours.pth").exists()

    @pytest.mark.parametrize(
        ("spoil", "complaint"),
        [
            (lambda value: value.to_sparse(), "torch.float32, torch.sparse_coo on cpu, expected a plain tensor"),
            (lambda value: value.to("meta"), "torch.float32, torch.strided on meta, expected a plain tensor"),
            (lambda value: torch.quantize_per_tensor(value, 1.0, 0, torch.qint8), "torch.qint8, torch.strided on cpu"),
            (lambda value: value[:1].expand(10**9, 64), "(1000000000, 64) expanded from fewer values"),
        ],
        ids=["sparse", "meta", "quantised", "expanded"],
    )
    @pytest.mark.parametrize("command", ["show", "export", "import"])
    @pytest.mark.filterwarnings("ignore")
    def test_refuses_tensors_that_are_not_plain(self, tmp_path, network, run, command, spoil, complaint):
        weights = network.state_dict()
        torch.save(weights | {"fc.weight": spoil(weights["fc.weight"])}, tmp_path / "w.pth")
        words = {"show": [], "export": [tmp_path / "x.pth"], "import": [tmp_path / "x.pth", "--model", "resnet8"]}[
            command
        ]
        code, _, errors = run(command, tmp_path / "w.pth", *words)
        assert code == 2
        assert complaint in errors or "not a readable checkpoint" in errors
        assert errors.count("\n") == 1

    def test_knows_torchvisions_vgg_by_the_order_of_its_shapes(self):
        with torch.device("meta"):
            theirs, ours = torchvision.models.vgg11_bn().state_dict(), get_model("vgg11-imagenet", 1000)
        renamed = in_order(theirs, ours)
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


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch you-have-been-had",)


class Settings(dict):
    """A mapping of a class of its own, as Lightning keeps hyperparameters in."""


class Wrapper(torch.nn.Module):
    """A network as an attribute, as a LightningModule has it."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.register_buffer("seen", torch.zeros(1), persistent=False)


def prefixed(prefix, weights):
    return {f"{prefix}{key}": value for key, value in weights.items()}


def old_format(content, path):
    torch.save(content, path, _use_new_zipfile_serialization=False)


# What is in the file, given a network's weights and another network's, and how to get them out.
FOREIGN = {
    "Lightning": (
        lambda own, other: {
            "epoch": 3,
            "state_dict": prefixed("model.", own) | {"criterion.weight": torch.ones(7)},
            "hyper_parameters": Settings(lr=0.1),
            "callbacks": {"checkpoint": {"best_model_path": "x", "kth": RunsCode()}},
        },
        ["--prefix", "model."],
    ),
    "one more tensor": (lambda own, other: own | {"criterion.weight": torch.ones(7)}, ["--drop", "criterion"]),
    "one more tensor within a part": (
        lambda own, other: own | {"fc.scale": torch.ones(7)},
        ["--drop", "fc.scale"],
    ),
    "one more tensor, data parallel": (
        lambda own, other: {"state_dict": prefixed("module.", own | {"centers": torch.ones(7, 3)})},
        ["--drop", "centers"],
    ),
    "two networks": (
        lambda own, other: prefixed("student.", other) | prefixed("teacher.", own),
        ["--prefix", "teacher."],
    ),
    "two networks, each a mapping": (
        lambda own, other: {"student": other, "teacher": own, "epoch": 3},
        ["--prefix", "teacher."],
    ),
    "both with and without a wrapper": (
        lambda own, other: other | prefixed("module.", own),
        ["--prefix", "module."],
    ),
    "timm": (
        lambda own, other: {"epoch": 3, "state_dict": own, "args": argparse.Namespace(lr=0.1), "version": 2},
        [],
    ),
    "code": (lambda own, other: {"state_dict": own, "x": RunsCode()}, []),
    "other names in the same order": (
        lambda own, other: {f"{number}.weight": value for number, value in enumerate(own.values())},
        [],
    ),
}


@pytest.fixture
def stranger(tmp_path, monkeypatch, network, request):
    """A file of somebody's, what is to be found in it, and how."""
    monkeypatch.chdir(tmp_path)
    make, words = FOREIGN[request.param]
    own = without_counters(network.state_dict())
    torch.save(make(own, {key: value + 1 for key, value in own.items()}), "theirs.ckpt")
    return own, words


class TestForeignFiles:
    @pytest.mark.parametrize("stranger", FOREIGN, indirect=True)
    def test_are_refused_with_the_command_that_reads_them_and_that_does(self, stranger, run):
        own, words = stranger
        options = ["--model", "resnet8", "--num-classes", "7"]
        with pytest.raises(UserError) as error:
            load_weights(get_model("resnet8", 7), Path("theirs.ckpt"), name="the teacher", import_options=options)
        command = str(error.value).partition("; this makes a file that can be loaded: ")[2]
        start = "python -m utils.convert import theirs.ckpt theirs-imported.pth --model resnet8 --num-classes 7"
        assert command == shlex.join([*start.split(), *words])
        code, _, errors = run(*shlex.split(command)[3:])
        assert (code, errors) == (0, "")
        fresh = get_model("resnet8", 7)
        load_weights(fresh, Path("theirs-imported.pth"))
        assert same(without_counters(fresh.state_dict()), own)
        assert not Path("you-have-been-had").exists()

    @pytest.mark.parametrize("save", [torch.save, old_format])
    @pytest.mark.parametrize("make", [lambda net: net, lambda net: {"model": Wrapper(net)}], ids=["bare", "wrapped"])
    def test_may_be_whole_pickled_modules(self, tmp_path, network, run, make, save):
        save(make(network), tmp_path / "w.pth")
        words = ["--model", "resnet8"]
        if isinstance(make(network), dict):
            words += ["--prefix", "model."]
        code, lines, _ = run("import", tmp_path / "w.pth", tmp_path / "ours.pth", *words)
        assert code == 0
        assert lines == [f"{tmp_path / 'ours.pth'}: resnet8 with 7 classes (every name and shape agrees)"]

    def test_of_which_only_the_head_is_other_are_found_where_a_new_one_is_trained(self, tmp_path, network):
        torch.save(prefixed("model.", network.state_dict()), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"--model resnet8 --prefix model\.$"):
            load_weights(
                get_model("resnet8", 3), tmp_path / "w.pth", new_head=True, import_options=["--model", "resnet8"]
            )

    def test_get_no_advice_where_there_is_none(self, tmp_path, network):
        torch.save(prefixed("model.", get_model("resnet14", 7).state_dict()), tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"lacks conv1.weight and \d+ more$"):
            load_weights(network, tmp_path / "w.pth", import_options=["--model", "resnet8"])

    def test_that_hold_themselves_are_refused_in_one_line(self, tmp_path, network, run):
        circle, forest = {}, {}
        circle["state_dict"] = circle
        for _ in range(30):
            forest = {f"branch {number}": forest for number in range(9)}
        for content in (circle, {"state_dict": forest}):
            torch.save(content, tmp_path / "w.pth")
            assert run("import", tmp_path / "w.pth", tmp_path / "x", "--model", "resnet8")[0] == 2
            with pytest.raises(UserError, match="expected 56 entries"):
                load_weights(network, tmp_path / "w.pth", import_options=["--model", "resnet8"])

    def test_with_two_entries_for_one_are_refused(self, tmp_path, network):
        torch.save(network.state_dict() | {"module.fc.bias": torch.zeros(7)}, tmp_path / "w.pth")
        with pytest.raises(UserError, match=r"holds two entries for one, fc\.bias and module\.fc\.bias$"):
            load_weights(network, tmp_path / "w.pth")
