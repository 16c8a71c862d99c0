"""Networks and weights of timm and torchvision, by name."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from test_cut import check_cuts
from toys import toy_source

from models import find_builder, get_model
from utils.config import Config, find_config
from utils.config.names import model_label, needs_small_lr, same_family
from utils.config.related import teacher_run
from utils.errors import UserError
from utils.training.build import build_task
from utils.training.trust import is_known_builder, refuse_foreign_network

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
RESNET = "torchvision.models.resnet18"
SOURCE = toy_source(torch.arange(9) % 3, "abc", (32, 32))


def config(name: str, new_head: bool = True, **kwargs) -> Config:
    network = {"name": name, "kwargs": kwargs, "new_head": new_head}
    return Config.from_dict({"dataset": {"name": "digits"}, "model": network})


def task(*args, **kwargs):
    return build_task(config(*args, **kwargs), SOURCE)


def test_names_of_timm_are_configs_labels_and_families():
    assert config("timm/resnet34.a1_in1k").run_dir == Path("run/digits/1029/timm-resnet34.a1_in1k")
    pair = find_config("digits", 1, teacher="timm/resnet34.a1_in1k", student="timm/resnet18", distiller="at").load()
    assert same_family("timm/resnet34.a1_in1k", "timm/resnet18")
    assert pair.run_dir.name == "timm-resnet34.a1_in1k-timm-resnet18"
    assert teacher_run(pair).config.run_dir == pair.teacher_checkpoint.parents[1]
    assert model_label("timm/vit_tiny", {"img_size": 64}) == "timm-vit_tiny-img_size-64"
    assert needs_small_lr("timm/mobilenetv3_small_100")
    assert not same_family("timm/resnet34", "resnet20")
    for name in ("timm/", "timm/../x", "timm//x", "hf/resnet18", "timm/hf-hub:a/b"):
        with pytest.raises(UserError, match="letters, digits, underscores, dashes and dots"):
            config(name)


def test_a_checkpoint_may_name_networks_of_timm_and_weights_that_its_own_replace():
    assert is_known_builder("timm/resnet18.a1_in1k")
    for settings in (config("timm/resnet18", pretrained=True), config(RESNET, weights="DEFAULT")):
        refuse_foreign_network(settings.model, "model", Path("theirs.pth"), [])
    with pytest.raises(UserError, match="checkpoint_path"):
        refuse_foreign_network(config("timm/resnet18", checkpoint_path="a.pth").model, "model", Path("theirs.pth"), [])


def test_the_teacher_of_a_student_is_started_from_weights_as_well():
    words = ["kd.teacher.kwargs={weights: DEFAULT}", "kd.teacher.new_head=true"]
    pair = find_config("digits", 1, teacher=RESNET, student="resnet8", distiller="at").load(words)
    assert teacher_run(pair).config.model.new_head


def test_without_timm_one_line_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^model 'timm/resnet18': needs timm; pip install timm$"):
        get_model("timm/resnet18", 3)


class TestTorchvision:
    @pytest.fixture
    def imagenet(self, monkeypatch):
        """What torchvision's server would send."""
        torch.manual_seed(7)
        content = torchvision.models.resnet18().state_dict()
        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: dict(content))
        return content

    def test_weights_by_name_get_a_new_classifier_and_keys_that_prepare_images_alike(self, imagenet, caplog):
        student = task(RESNET, weights="ResNet18_Weights.IMAGENET1K_V1").student
        assert student.network.fc.weight.shape == (3, 512)
        assert torch.equal(student.network.layer4[1].conv2.weight, imagenet["layer4.1.conv2.weight"])
        assert "std [0.229, 0.224, 0.225], here [0.25, 0.25, 0.25]; image_size [224, 224], here [32, 32]" in caplog.text
        assert "dataset.mean=[0.485,0.456,0.406] dataset.std=[0.229,0.224,0.225]" in caplog.text

    def test_every_mistake_is_one_line(self, imagenet, monkeypatch):
        with pytest.raises(UserError, match=r"its weights do not fit \(new_head=true .*fc\.weight has shape"):
            task(RESNET, new_head=False, weights="DEFAULT")
        with pytest.raises(UserError, match=r"weights is 'w\.pth', must be IMAGENET1K_V1 or DEFAULT"):
            task(RESNET, weights="w.pth")

        def offline(url, **_):
            raise OSError("no network")

        monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
        with pytest.raises(UserError, match=r"reading the weights DEFAULT .*checkpoint=FILE .* failed: .*no network"):
            task(RESNET, weights="DEFAULT")


@needs_timm
class TestTimm:
    @pytest.mark.parametrize(
        ("name", "kwargs", "shapes"),
        [
            (
                "vit_tiny_patch16_224",
                {"img_size": 64, "depth": 8, "embed_dim": 24},
                [(48, 4, 4), (48, 4, 4), (48, 4, 4), (48, 4, 4), (24,)],
            ),
            ("convnext_atto", {}, [(40, 16, 16), (80, 8, 8), (160, 4, 4), (320, 2, 2), (320,)]),
            (
                "swin_tiny_patch4_window7_224",
                {"img_size": 64, "depths": [1, 1, 1, 1], "embed_dim": 24},
                [(24, 16, 16), (48, 8, 8), (96, 4, 4), (192, 2, 2), (192,)],
            ),
        ],
    )
    def test_is_cut_where_timm_has_features_and_goes_on_from_each(self, name, kwargs, shapes):
        model = get_model(f"timm/{name}", 5, kwargs=kwargs, image_size=(64, 64)).eval()
        assert model.feature_shapes(64, 64) == shapes
        check_cuts(model, model.network, torch.randn(2, 3, 64, 64))

    def test_a_name_that_it_does_not_have_is_answered_with_some_that_it_has(self):
        with pytest.raises(UserError, match=r"^model 'timm/resnet19': timm has no network 'resnet19'; it has resnet"):
            find_builder("timm/resnet19")

    def test_pretrained_weights_come_from_a_file(self, tmp_path, monkeypatch):
        import timm

        torch.manual_seed(7)
        own = timm.create_model("resnet10t").state_dict()
        torch.save(own, tmp_path / "w.pth")
        student = task("timm/resnet10t.c3_in1k", pretrained=str(tmp_path / "w.pth")).student
        assert torch.equal(student.network.layer4[0].conv2.weight, own["layer4.0.conv2.weight"])
        assert student.network.fc.weight.shape == (3, 512)
        with pytest.raises(UserError, match=r"size mismatch for fc\.weight"):
            task("timm/resnet10t.c3_in1k", new_head=False, pretrained=str(tmp_path / "w.pth"))
        tuned = timm.create_model("resnet10t", num_classes=3).state_dict()
        torch.save(tuned, tmp_path / "w.pth")
        student = task("timm/resnet10t.c3_in1k", new_head=False, pretrained=str(tmp_path / "w.pth")).student
        assert torch.equal(student.network.fc.weight, tuned["fc.weight"])
        with pytest.raises(UserError, match="know 1000 classes, here 3; new_head=true"):
            task("timm/resnet10t.c3_in1k", new_head=False, pretrained=True)
        with pytest.raises(UserError, match=r"pretrained is 'nowhere\.pth', must be true or a file"):
            task("timm/resnet10t.c3_in1k", pretrained="nowhere.pth")

        def offline(*_, **__):
            raise OSError("offline")

        monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
        with pytest.raises(UserError, match=r"reading the pretrained weights \(pretrained=FILE .*\) failed: "):
            task("timm/resnet10t.c3_in1k", pretrained=True)
