"""Weights are found in files of any project, under any key and prefix; those that do not fit are refused."""

import argparse
import logging

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from toys import ToyNet

from models import get_model
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.weights import COUNTERS, head_keys, load_weights


def entries(step: float = 1, **how) -> dict[str, torch.Tensor]:
    """Weights of a toy network, every entry moved by `step`."""
    weights = ToyNet(**how).state_dict()
    return {key: value.detach().clone() + step for key, value in weights.items()}


def under(prefix: str, weights: dict) -> dict:
    return {f"{prefix}{key}": value for key, value in weights.items()}


def without_counters(weights: dict) -> dict:
    return {key: value for key, value in weights.items() if not key.endswith(COUNTERS)}


def renamed(weights: dict, ends: dict[str, str]) -> dict:
    """Other names for the layers; the last part of each name as `ends` says."""
    parts = {key: key.rpartition(".")[2] for key in without_counters(weights)}
    return {f"layer{i}.{ends.get(end, end)}": weights[key] for i, (key, end) in enumerate(parts.items())}


def same(left: dict, right: dict) -> bool:
    return bool(left) and all(torch.equal(value, right[key]) for key, value in left.items())


def loaded(content, tmp_path, what="the teacher toy", **how) -> dict:
    """What a network has after loading a file of `content`, without BatchNorm's counters."""
    model = ToyNet()
    torch.save(content, tmp_path / "w.pth")
    load_weights(model, tmp_path / "w.pth", what, **how)
    return without_counters(model.state_dict())


class Settings(dict):
    """A mapping of a class of its own, as Lightning keeps hyperparameters in."""


class Callback:
    def __init__(self):
        self.best = torch.ones(3)
        self.history = np.arange(3)


OWN, OTHER = entries(1), entries(2)
FILES = {
    "bare": (OWN, ""),
    "published code and RepDistiller": (
        {"epoch": 240, "model": OWN, "best_acc": np.float64(74.6), "opt": argparse.Namespace(lr=1), "optimizer": {}},
        "under model",
    ),
    "compiled data parallel": (under("module._orig_mod.", OWN), "under module._orig_mod"),
    "a word of one's own": ({"model_state": under("backbone.", OWN)}, "under model_state.backbone"),
    "Lightning": (
        {
            "state_dict": under("model.", OWN) | {"criterion.weight": torch.ones(7)},
            "hyper_parameters": Settings(lr=0.1),
            "callbacks": {"kept": Callback()},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
        },
        "under state_dict.model",
    ),
    "timm": (
        {"state_dict": OTHER, "state_dict_ema": OWN, "args": argparse.Namespace(lr=1), "version": 2},
        "under state_dict_ema, checkpoint_prefix=state_dict takes the other",
    ),
    "mdistiller's latest": (
        {
            "model": under("module.student.", OTHER)
            | under("module.teacher.", OWN)
            | {"module.regressor.weight": torch.ones(3)},
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(3)}}},
        },
        "under model.module.teacher",
    ),
    "a larger network beside it": ({"student": entries(width=6), "large": OWN}, "under large"),
    "other names": (renamed(OWN, {}), "matched by order because the names differ"),
    "other names, behind a prefix": (
        {"net": under("m.", renamed(OWN, {"running_mean": "moving_mean"})), "x": torch.ones(3)},
        "under net.m, matched by order because the names differ",
    ),
    "double precision, before batches were counted": (
        {"model": {key: value.double() for key, value in without_counters(OWN).items()}},
        "under model",
    ),
}


@pytest.mark.parametrize("kind", FILES)
def test_files_in_circulation_are_loaded_and_one_line_says_what(tmp_path, caplog, kind):
    caplog.set_level(logging.INFO, "sakd")
    content, said = FILES[kind]
    found = loaded(content, tmp_path)
    assert same(found, OWN)
    (line,) = caplog.messages
    assert line.startswith(f"the teacher toy: weights of {tmp_path / 'w.pth'}, ")
    assert line.endswith(f"entries, {said}" if said else "entries")


@pytest.mark.parametrize("name", ["w.safetensors", "w"])
def test_formats_are_known_by_their_content(tmp_path, name):
    path, model = tmp_path / name, ToyNet()
    safetensors.torch.save_file(under("net.", OWN), path)
    size, rest = int.from_bytes(path.read_bytes()[:8], "little"), path.read_bytes()[8:]
    looks_like_text = int.from_bytes(b" <\0\0\0\0\0\0", "little")  # the length of the header
    path.write_bytes(looks_like_text.to_bytes(8, "little") + rest[:size].ljust(looks_like_text) + rest[size:])
    load_weights(model, path)
    assert same(without_counters(model.state_dict()), OWN)
    torch.save(OTHER, path, _use_new_zipfile_serialization=False)
    load_weights(model, path)
    assert same(without_counters(model.state_dict()), OTHER)


def test_a_whole_network_and_a_checkpoint_of_ours_give_their_weights(tmp_path):
    network = ToyNet()
    network.load_state_dict(OWN)
    network.register_buffer("passing", torch.ones(2), persistent=False)
    assert same(loaded({"net": network}, tmp_path), OWN)
    assert same(loaded({"format": 1, "model": OWN, "ema": OTHER, "extra": under("x.", OTHER)}, tmp_path), OWN)


PREFIXES = {
    "the weights, not their average": ({"state_dict": OWN, "state_dict_ema": OTHER}, "state_dict"),
    "one of many": ({"a": OTHER, "b": {"c": OWN}, "d": OTHER}, "b"),
    "the outer one": (OWN | under("module.", OTHER), "."),
}


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_prefix_chooses(tmp_path, kind):
    content, prefix = PREFIXES[kind]
    assert same(loaded(content, tmp_path, prefix=prefix), OWN)


def test_the_role_of_the_network_chooses(tmp_path):
    both = {"model": under("module.student.", OTHER) | under("module.teacher.", OWN)}
    assert same(loaded(both, tmp_path, "the student toy"), OTHER)
    with pytest.raises(UserError, match=r"2 sets of entries fit toy: model\.module\.student, model\.module\.teacher; "):
        loaded(both, tmp_path, "toy")


@pytest.mark.parametrize("rename", [dict, lambda weights: renamed(weights, {})], ids=["same names", "other names"])
def test_a_new_head_is_left_alone_whatever_its_width(tmp_path, rename):
    fresh, wide = ToyNet(num_classes=5), entries(num_classes=1000)
    before = fresh.fc.weight.clone()
    torch.save({"model": rename(wide)}, tmp_path / "w.pth")
    load_weights(fresh, tmp_path / "w.pth", new_head=True)
    assert torch.equal(fresh.fc.weight, before)
    body = {key: value for key, value in without_counters(wide).items() if not key.startswith("fc.")}
    assert same(body, fresh.state_dict())
    assert head_keys(fresh) == {"fc.weight", "fc.bias"}


REFUSED = {
    "two that fit": ({"a": OWN, "b": OTHER}, "2 sets of entries fit the teacher toy: a, b; checkpoint_prefix=<one of"),
    "another within it": (OWN | under("module.", OTHER), r"fit the teacher toy: \., module; "),
    "width": (entries(width=6), r"conv1\.weight has shape \(6, 3, 3, 3\), expected \(4, 3, 3, 3\)"),
    "too little": ({key: value for key, value in OWN.items() if key != "fc.bias"}, "the file lacks fc.bias"),
    "too much behind a prefix": (under("net.", OWN | {"a\nb": torch.ones(1)}), r"has the unknown a\\nb"),
    "other names, BatchNorm in another order": (
        renamed(OWN, {"weight": "running_mean", "running_mean": "weight"}),
        "lacks conv1",
    ),
    "other names in alphabetical order": (
        {f"{number:02d}{name}": value for number, (name, value) in enumerate(renamed(OWN, {}).items())},
        "lacks conv1",
    ),
    "names that are none": ({3: torch.ones(2), None: 1}, "lacks conv1.weight and"),
    "NaN": (OWN | {"bn1.running_var": torch.full((4,), torch.nan)}, r"bn1\.running_var holds NaN"),
    "too large once cast": (OWN | {"fc.bias": torch.ones(5).double() * 1e300}, r"fc\.bias holds NaN or infinite"),
    "no tensor": (OWN | {"fc.bias": [0, 0]}, r"fc\.bias is a list, expected a tensor"),
    "whole numbers": (OWN | {"fc.bias": torch.ones(5, dtype=int)}, r"bias is torch\.int64, expected torch\.float32"),
    "expanded": (OWN | {"fc.bias": torch.ones(1).expand(5)}, r"fc\.bias is \(5,\) expanded from fewer values"),
    "nested": (OWN | {"fc.bias": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}, "nested"),
    "half a byte each": (OWN | {"fc.bias": torch.ones(5, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}, "w.pth: "),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_refused_in_one_line_and_changes_nothing(tmp_path, kind):
    content, complaint = REFUSED[kind]
    path, model = tmp_path / "w.pth", ToyNet()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.save(content, path)
    with pytest.raises(UserError, match=complaint) as error:
        load_weights(model, path, "the teacher toy")
    assert str(path) in str(error.value)
    assert same(model.state_dict(), before)


def test_float8_is_cast(tmp_path):
    found = loaded(OWN | {"fc.bias": torch.full((5,), 1.5).to(torch.float8_e4m3fn)}, tmp_path)
    assert found["fc.bias"].tolist() == [1.5] * 5


def test_a_part_of_a_larger_network_is_not_taken_for_a_smaller_one(tmp_path):
    torch.save(get_model("resnet14", 7).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"has the unknown layer1\.1\.conv1\.weight and 35 more"):
        load_weights(get_model("resnet8", 7), tmp_path / "w.pth")


@pytest.mark.slow
def test_torchvisions_vgg_is_matched_by_order_and_gives_the_same_logits(tmp_path):
    theirs, ours = torchvision.models.vgg11_bn(num_classes=7), get_model("vgg11-imagenet", 7)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    load_weights(ours, tmp_path / "w.pth")
    image = torch.randn(1, 3, 224, 224)
    torch.testing.assert_close(ours.eval()(image), theirs.eval()(image))


@pytest.mark.parametrize("old", [False, True])
def test_objects_are_read_as_what_they_hold(tmp_path, old):
    content = {"a": argparse.Namespace(lr=1), "b": Settings(lr=2), "c": Callback(), "d": np.float32(3)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not old)
    read = read_checkpoint(tmp_path / "w.pth")
    assert vars(read["a"]) == {"lr": 1}
    assert (read["b"], read["d"]) == ({"lr": 2}, 3)
    assert torch.equal(vars(read["c"])["best"], torch.ones(3))
    assert {type(value).__module__ for value in read.values()} == {"collections", "numpy"}
