"""A checkpoint is data: it chooses no code to run, no file to read or fetch, and no folder to write to."""

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from utils import evaluate, export, inspect_gates
from utils.config import Config
from utils.errors import UserError
from utils.training.restore import restore
from utils.training.trust import is_known_builder, refuse_foreign_network, refuse_foreign_options

CHECKPOINT = Path("theirs.pth")


def single(name="vgg8", **kwargs) -> Config:
    return Config.from_dict({"dataset": {"name": "digits"}, "model": {"name": name, "kwargs": kwargs}})


def pair() -> Config:
    networks = {"teacher": {"name": "vgg13"}, "student": {"name": "vgg8"}}
    return Config.from_dict({"dataset": {"name": "digits"}, "kd": networks, "kd_loss": {"name": "at"}})


@pytest.mark.parametrize(
    "name",
    ["vgg8", "ResNet18", "torchvision.models.resnet18", "torchvision.models.resnet.resnet18", "timm.create_model"],
)
def test_builders_of_the_project_and_of_the_libraries_are_known(name):
    assert is_known_builder(name)
    refuse_foreign_network(single(name).model, "model", CHECKPOINT, [])


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "torchvision.models.get_model",
        "torchvision.models.resnet.load_state_dict_from_url",
        "torchvision.models.detection.fasterrcnn_resnet50_fpn",  # fetches a backbone
        "torchvision.models_evil.resnet18",
        "timm.create_models",
    ],
)
def test_every_other_name_must_stand_on_the_command_line(name):
    for key in ("model", "kd.student", "kd.teacher"):
        with pytest.raises(UserError, match=rf"theirs.pth: {key}\.name is {name}, no network of this project"):
            refuse_foreign_network(single(name).model, key, CHECKPOINT, ["training.device=cpu"])
        for agreement in ([f"{key}.name={name}"], None):
            refuse_foreign_network(single(name).model, key, CHECKPOINT, agreement)


def test_of_timm_only_builders_of_models_are_known(monkeypatch):
    fake = ModuleType("timm")  # the little of it that says which models it has
    fake.list_models = lambda: ["resnet18"]
    fake.model_entrypoint = lambda name: SimpleNamespace(__module__="timm.models.resnet")
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert is_known_builder("timm.models.resnet18")
    assert is_known_builder("timm.models.resnet.resnet18")
    for name in ("timm.models.vit.resnet18", "timm.models.resnet.load_pretrained", "timm.models_evil.resnet18"):
        assert not is_known_builder(name)


def test_numbers_and_words_may_be_arguments_but_not_a_file_to_read_or_to_fetch():
    plain = {"ratio": 0.5, "act_layer": "relu", "sizes": [1, 2], "norm": None, "deep": {"a": 1}, "model_name": "a.b_1"}
    harmless = single("timm.create_model", pretrained=False, weights=None, **plain)
    refuse_foreign_network(harmless.model, "model", CHECKPOINT, [])
    for kwargs in (
        {"pretrained": 1},
        {"weights": "DEFAULT"},
        {"checkpoint_path": "w.pth"},
        {"pretrained_cfg": {"hf_hub_id": "somebody"}},
        {"file": "/etc/passwd"},
        {"model_name": "hf-hub:somebody/something"},
        {"deep": {"er": [1, {"path": "a/b"}]}},
        {"a": {"b": "/etc"}, "a.b": 1},
    ):
        model = single("timm.create_model", **kwargs).model
        with pytest.raises(UserError, match=r"theirs.pth: model\.kwargs\..* is .*<value> on the command line.*--trust"):
            refuse_foreign_network(model, "model", CHECKPOINT, ["model.name=timm.create_model"])
        for name, value in kwargs.items():
            if not isinstance(value, dict):
                refuse_foreign_network(model, "model", CHECKPOINT, [f"model.kwargs.{name}={value}"])


def test_options_of_distillers_and_policies_are_arguments_as_well():
    for section, key in (("kd_loss", "options"), ("kd_loss", "logits_options"), ("kd", "policy_options")):
        settings = pair().to_dict()
        settings[section][key] = {"bank": "/etc/passwd"}
        with pytest.raises(UserError, match=rf"{section}\.{key}\.bank is '/etc/passwd'"):
            refuse_foreign_options(Config.from_dict(settings), CHECKPOINT, [])


@pytest.fixture
def spoilt(trained_run, tmp_path, monkeypatch):
    """Make a checkpoint of the run whose config differs, in a folder with a module that leaves a trace."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trap", raising=False)
    Path("trap.py").write_text(
        "from pathlib import Path\n\nfrom models import get_model\n\nPath('imported').touch()\n\n\n"
        "def Net(num_classes):\n    return get_model('resnet8', num_classes)\n"
    )

    def make(section: str, **values) -> str:
        content = torch.load(trained_run / "ckpt" / "best.pth", weights_only=True)
        place = content["config"]
        for name in section.split("."):
            place = place[name]
        place.update(values)
        torch.save(content, "theirs.pth")
        return "theirs.pth"

    return make


COMMANDS = {"evaluate": evaluate.main, "export": export.main, "inspect_gates": inspect_gates.main}


def test_a_student_is_exported_without_the_code_of_its_teacher(spoilt):
    restored = restore(Path(spoilt("kd.teacher", name="trap.Net")))
    assert restored.student().feature_shapes(32, 32)
    with pytest.raises(UserError, match=r"kd\.teacher\.name is trap\.Net, no network of this project"):
        restored.teacher()
    assert not Path("imported").exists()


@pytest.mark.parametrize("command", COMMANDS)
def test_no_command_runs_code_that_a_checkpoint_names(spoilt, command):
    for role in ("student", "teacher")[: 1 if command == "export" else 2]:  # which needs no teacher
        with pytest.raises(UserError, match=rf"kd\.{role}\.name is trap\.Net, no network of this project"):
            COMMANDS[command]([spoilt(f"kd.{role}", name="trap.Net")])
    if command == "inspect_gates":
        with pytest.raises(UserError, match=r"kd_loss\.options\.bank is '/etc/passwd'"):
            COMMANDS[command]([spoilt("kd_loss", options={"bank": "/etc/passwd"})])
    assert not Path("imported").exists()


@pytest.mark.parametrize("agreement", [{"trust": True}, {"overrides": ["kd.student.name=trap.Net"]}], ids=str)
def test_code_that_the_command_line_agrees_to_is_run(spoilt, agreement):
    restored = restore(Path(spoilt("kd.student", name="trap.Net")), **agreement)
    assert restored.student().feature_shapes(32, 32)
    assert Path("imported").exists()


@pytest.mark.parametrize(
    ("agreement", "answer"),
    [
        ({}, "dataset.root: data, which a file names, holds no cifar-10-batches-py"),
        ({"trust": True}, "cannot be downloaded .*asked the network for"),
        ({"overrides": ["dataset.root=data"]}, "cannot be downloaded .*asked the network for"),
    ],
    ids=str,
)
def test_a_data_set_is_downloaded_only_to_where_the_command_line_says(spoilt, monkeypatch, agreement, answer):
    def refuse(url, **_):
        raise AssertionError(f"asked the network for {url}")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    Path("data").mkdir()
    with pytest.raises(UserError, match=answer):
        restore(Path(spoilt("dataset", name="cifar-10", root="data")), **agreement)
    assert not list(Path("data").iterdir())
