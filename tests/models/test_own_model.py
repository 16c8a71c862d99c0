"""Models of one's own, on images of one's own: trained by the real entry, then a teacher, then started from weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
import yaml
from pictures import image_folder

from utils.cli import main_distill, main_single
from utils.run_folder.checkpoint import read_checkpoint

RESNET_STAGES = [
    ["conv1", "bn1", "relu", "maxpool"],
    ["layer1"],
    ["layer2"],
    ["layer3"],
    ["layer4"],
    ["avgpool", "flatten"],
    ["fc"],
]
RESNET, MOBILENET = "torchvision.models.resnet18", "torchvision.models.mobilenet_v2"


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


def test_it_is_trained_under_its_import_path_and_keeps_its_own_names():
    weights = train_single(root="automatic")
    own = torchvision.models.resnet18(num_classes=2)
    own.load_state_dict(weights)


def test_stages_may_be_spelt_out():
    automatic = train_single(root="automatic_again")
    spelt_out = train_single(f"model.stages={RESNET_STAGES}", root="spelt_out")
    assert all(torch.equal(automatic[key], spelt_out[key]) for key in automatic)


def test_it_starts_from_weights_for_other_classes_with_a_new_head():
    frozen = ["model.checkpoint=resnet18.pth", "model.new_head=true", "training.lr=1e-12"]
    weights = train_single(*frozen, root="new_head")
    assert weights["fc.weight"].shape == (2, 512)
    imagenet = read_checkpoint(Path("resnet18.pth"))
    for name in ("conv1.weight", "layer3.0.downsample.0.weight", "layer4.1.conv2.weight"):
        torch.testing.assert_close(weights[name], imagenet[name], rtol=0, atol=1e-6)


def test_it_teaches_another_model_of_ones_own():
    train_single(root="run")
    names = ["--teacher", RESNET, "--student", MOBILENET, "--distiller", "at"]
    main_distill(arguments=["--dataset", "pets", *names])
    run = Path(f"run/pets/1029/adaptive-at/{RESNET}-{MOBILENET}")
    student = torchvision.models.mobilenet_v2(num_classes=2)
    student.load_state_dict(read_checkpoint(run / "ckpt/best.pth")["model"])
    assert (run / "result.json").exists()
