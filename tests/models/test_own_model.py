"""Models of one's own, on images of one's own: trained by the real entry, then a teacher, then started from weights."""

from __future__ import annotations

from pathlib import Path

import odd_networks
import pytest
import torch
import torchvision
import yaml
from odd_networks import Own
from pictures import image_folder

from models import MODELS
from utils import export
from utils.cli import main_distill, main_single
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint

RESNET = "torchvision.models.resnet18"
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


def weights_of(run: str) -> dict:
    return read_checkpoint(Path("run/pets/1029") / run / "ckpt/last.pth")["model"]


def test_a_classifier_of_imagenet_with_a_new_head_teaches_a_network_whose_parts_have_any_name(tmp_path, capsys):
    """It is trained, distilled, resumed and exported."""
    frozen = ["model.checkpoint=resnet18.pth", "model.new_head=true", "training.lr=1e-12"]
    main_single(["--dataset", "pets", "--model", RESNET, *frozen])
    weights, imagenet = weights_of(RESNET), read_checkpoint(Path("resnet18.pth"))
    torchvision.models.resnet18(num_classes=2).load_state_dict(weights)
    for name in ("conv1.weight", "layer3.0.downsample.0.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(weights[name], imagenet[name], rtol=0, atol=1e-6)

    pair = ["--dataset", "pets", "--teacher", RESNET, "--student", ODD_NAMES, "--distiller", "at"]
    main_distill(arguments=pair)
    run = Path(f"run/pets/1029/adaptive-at/{RESNET}-{ODD_NAMES}")
    content = read_checkpoint(run / "ckpt/last.pth")
    assert list(content["model"])[:2] == ["features.weight", "features.bias"]
    assert not content["model"]["run.running_mean"].any()  # its own `train` keeps that BatchNorm as it is
    main_distill(arguments=[*pair, "training.epochs=2", "--resume"])
    content = read_checkpoint(run / "ckpt/last.pth")
    assert content["progress"]["epoch"] == 2
    export.main([str(run), "--trust", f"--out={tmp_path / 'odd.pt2'}"])
    assert "same logits" in capsys.readouterr().out
    assert "features.weight" in torch.export.load(tmp_path / "odd.pt2").state_dict

    content["extra"]["policy.linear.weight"] = torch.zeros(2, 2)  # a run from before, with other features
    torch.save(content, run / "ckpt/last.pth")
    with pytest.raises(UserError, match=r"policy.linear.weight is \(2, 2\), here .* cut elsewhere \(kd\.student\."):
        main_distill(arguments=[*pair, "training.epochs=2", "--resume"])


def test_stages_may_be_spelt_out():
    with pytest.raises(UserError, match="stages: finding 'middle'"):
        main_single(["--dataset", "pets", "--model", "odd_networks.Chain", "model.stages=[[stem], [middle]]"])


def test_networks_that_cannot_be_cut_are_trained_distilled_and_exported(tmp_path, capsys):
    main_single(["--dataset", "pets", "--model", CONNECTED, "model.label=body"])
    main_single(["--dataset", "pets", "--model", "odd_networks.in_parallel"])
    assert weights_of("odd_networks.in_parallel").keys() == weights_of("body").keys(), "no prefix"
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


def test_a_new_head_is_also_that_of_a_classifier_that_only_training_has(tmp_path):
    torch.save(odd_networks.Auxiliary(1000).state_dict(), tmp_path / "wide.pth")
    words = [f"model.checkpoint={tmp_path / 'wide.pth'}", "model.new_head=true"]
    main_single(["--dataset", "pets", "--model", "odd_networks.Auxiliary", *words])
    assert weights_of("odd_networks.Auxiliary")["second.weight"].shape == (2, 4)


def test_logits_alone_are_exported_of_a_network_that_gives_more(tmp_path, capsys):
    main_single(["--dataset", "pets", "--model", "odd_networks.Answer"])
    export.main(["run/pets/1029/odd_networks.Answer", "--trust", f"--out={tmp_path / 'answer.pt2'}"])
    assert "same logits" in capsys.readouterr().out


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
