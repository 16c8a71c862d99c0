"""Models of one's own, on images of one's own: trained by the real entry, then a teacher, then started from weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from odd_networks import RESNET_STAGES, Own
from pictures import image_folder

from models import MODELS
from utils import export
from utils.cli import main_distill, main_single
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint

RESNET, MOBILENET = "torchvision.models.resnet18", "torchvision.models.mobilenet_v2"
CONNECTED, ODD_NAMES = "odd_networks.Connected", "odd_networks.OddNames"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with a data set of two classes, its config, and an ImageNet classifier's weights."""
    folder = tmp_path_factory.mktemp("own")
    image_folder(folder / "pets", train=4, val=2, size=(32, 32))
    repo = Path(__file__).resolve().parents[2]
    (folder / "configs").mkdir()
    (folder / "configs/base").symlink_to(repo / "configs/base")
    (folder / "configs/pets").mkdir()
    settings = {
        "dataset": {"name": "imagefolder", "label": "pets", "root": "pets", "img_h": 32},
        "training": {"epochs": 1, "lr_decay_epochs": [], "batch_size": 4, "num_workers": 0, "device": "cpu"},
        "validation": {"num_workers": 0},
    }
    (folder / "configs/pets/base.yml").write_text(yaml.safe_dump(settings))
    torch.save(torchvision.models.resnet18().state_dict(), folder / "resnet18.pth")
    return folder


@pytest.fixture(autouse=True)
def _at_the_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def train_single(*overrides: str, root: str) -> dict:
    """Train a ResNet-18 and return its best weights."""
    main_single(["--dataset", "pets", "--model", RESNET, f"run.root={root}", *overrides])
    return read_checkpoint(Path(root) / f"pets/1029/{RESNET}/ckpt/best.pth")["model"]


@pytest.fixture(scope="module")
def trained(workplace):
    """The weights of one whose stages are found automatically, and which lies where a student looks for its teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        return train_single(root="run")


def test_it_is_trained_under_its_import_path_and_keeps_its_own_names(trained):
    own = torchvision.models.resnet18(num_classes=2)
    own.load_state_dict(trained)


def test_stages_may_be_spelt_out(trained):
    spelt_out = train_single(f"model.stages={RESNET_STAGES}", root="spelt_out")
    assert all(torch.equal(trained[key], spelt_out[key]) for key in trained)


def test_it_starts_from_weights_for_other_classes_with_a_new_head():
    frozen = ["model.checkpoint=resnet18.pth", "model.new_head=true", "training.lr=1e-12"]
    weights = train_single(*frozen, root="new_head")
    assert weights["fc.weight"].shape == (2, 512)
    imagenet = read_checkpoint(Path("resnet18.pth"))
    for name in ("conv1.weight", "layer3.0.downsample.0.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(weights[name], imagenet[name], rtol=0, atol=1e-6)


def test_it_teaches_another_network_of_torchvision_which_is_exported(trained, tmp_path, capsys):
    names = ["--teacher", RESNET, "--student", MOBILENET, "--distiller", "at"]
    main_distill(arguments=["--dataset", "pets", *names])
    run = Path(f"run/pets/1029/adaptive-at/{RESNET}-{MOBILENET}")
    student = torchvision.models.mobilenet_v2(num_classes=2)
    student.load_state_dict(read_checkpoint(run / "ckpt/best.pth")["model"])
    assert (run / "result.json").exists()
    export.main([str(run), f"--out={tmp_path / 'student.pt2'}"])
    assert "same logits" in capsys.readouterr().out


def test_networks_that_cannot_be_cut_are_trained_distilled_and_exported(tmp_path, capsys):
    main_single(["--dataset", "pets", "--model", CONNECTED, "model.label=body"])
    main_single(["--dataset", "pets", "--model", CONNECTED, "model.kwargs.classifier=false"])
    pair = ["--dataset", "pets", "--teacher", CONNECTED, "--student", CONNECTED]
    names = ["kd.teacher.kwargs.classifier=false", "kd.student.label=body"]  # one piece teaches body and classifier
    main_distill(arguments=[*pair, "--distiller", "kd", *names])
    run = Path("run/pets/1029/adaptive-kd/odd_networks.Connected-classifier-false-body")
    assert read_checkpoint(run / "ckpt/best.pth")["extra"]["policy.linear.weight"].shape == (2, 4)
    export.main([str(run), "--trust", f"--out={tmp_path / 'body.pt2'}"])
    assert "same logits" in capsys.readouterr().out

    reason = r"torch\.fx cannot follow its forward \(TraceError: .*odd_networks\.py, line"
    with pytest.raises(UserError, match=rf"^AT finds no spot in .*; kd\.student\.stages names stages .*: {reason}"):
        main_distill(arguments=[*pair, "--distiller", "at", *names])
    with pytest.raises(UserError, match=r"^pkt: the teacher is one piece [^;]*; distiller=kd [^;]*; kd\.student"):
        main_distill(arguments=[*pair, "--distiller", "pkt", *names])


def test_a_network_whose_parts_have_any_name_is_trained_distilled_resumed_and_exported(tmp_path, capsys):
    main_single(["--dataset", "pets", "--model", ODD_NAMES])
    pair = ["--dataset", "pets", "--teacher", ODD_NAMES, "--student", ODD_NAMES, "--distiller", "at"]
    main_distill(arguments=[*pair, "kd.student.label=student"])
    run = Path("run/pets/1029/adaptive-at/odd_networks.OddNames-student")
    content = read_checkpoint(run / "ckpt/last.pth")
    assert list(content["model"])[:2] == ["features.weight", "features.bias"]
    assert not content["model"]["run.running_mean"].any()  # its own `train` keeps that BatchNorm as it is
    main_distill(arguments=[*pair, "kd.student.label=student", "training.epochs=2", "--resume"])
    content = read_checkpoint(run / "ckpt/last.pth")
    export.main([str(run), "--trust", f"--out={tmp_path / 'odd.pt2'}"])
    assert "same logits" in capsys.readouterr().out
    assert "features.weight" in torch.export.load(tmp_path / "odd.pt2").state_dict

    content["extra"]["policy.linear.weight"] = torch.zeros(2, 2)  # a run from before, with other features
    torch.save(content, run / "ckpt/last.pth")
    with pytest.raises(UserError, match=r"are cut elsewhere since 2026-11, kd\.student\.stages names the former cut"):
        main_distill(arguments=[*pair, "kd.student.label=student", "training.epochs=2", "--resume"])


@pytest.mark.parametrize(
    ("model", "words", "complaint"),
    [
        ("stubborn", [], r"gives logits of shape \(10,\) for an image, and the data has 2 classes; its last layer"),
        ("vgg8", ["dataset.img_h=4"], r"running it on images of 4x4 failed: RuntimeError: .*too small"),
    ],
)
def test_a_registered_network_that_does_not_fit_is_refused_before_anything_is_written(
    model, words, complaint, monkeypatch
):
    stubborn = {"stubborn": lambda num_classes: Own(10)}
    monkeypatch.setattr(MODELS, "_entries", {name: MODELS.get(name) for name in MODELS} | stubborn)
    with pytest.raises(UserError, match=f"^model '{model}': {complaint}"):
        main_single(["--dataset", "pets", "--model", model, "run.root=misfit", *words])
    assert not Path("misfit").exists()
