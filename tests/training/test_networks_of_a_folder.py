"""A run folder that holds another network than the one that is meant is refused, in one line that names both."""

import pytest
import yaml
from config_texts import PAIR, SINGLE

from utils.config import Config
from utils.errors import UserError
from utils.run_folder.networks import refuse_other_teacher, refuse_run_of_others
from utils.training.build import load_teacher
from utils.training.run import train

TIMM = {"name": "timm.create_model", "label": "net", "kwargs": {"model_name": "resnet18"}}
OTHER_TIMM = TIMM | {"kwargs": {"model_name": "resnet34"}}
NAMES = "holds a run of timm.create_model-model_name-resnet34, not of timm.create_model-model_name-resnet18; {}"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def config(text: str = SINGLE, **changes) -> Config:
    return Config.from_dict(yaml.safe_load(text) | changes)


def leave_a_run(config: Config) -> None:
    (config.run_dir / "ckpt").mkdir(parents=True)
    (config.run_dir / "ckpt/best.pth").touch()
    (config.run_dir / "config.yml").write_text(yaml.safe_dump(config.to_dict()))


def test_a_run_of_another_network_is_neither_repeated_nor_resumed():
    leave_a_run(config(model=OTHER_TIMM))
    for resume in (False, True):
        with pytest.raises(UserError, match=NAMES.format("model.label=")):
            train(config(model=TIMM), resume=resume)
    for role in ("teacher", "student"):
        pair = {"teacher": {"name": "vgg13"}, "student": {"name": "vgg8"}}
        leave_a_run(config(PAIR, kd=pair | {role: OTHER_TIMM}))
        with pytest.raises(UserError, match=NAMES.format(f"kd.{role}.label=")):
            refuse_run_of_others((wanted := config(PAIR, kd=pair | {role: TIMM})).run_dir, wanted)


def test_a_teacher_that_was_trained_as_another_network_is_refused_unless_its_file_is_named():
    leave_a_run(config(model=OTHER_TIMM))
    pair = {"teacher": TIMM, "student": {"name": "vgg8"}}
    with pytest.raises(UserError, match=NAMES.format("kd.teacher.label=")):
        load_teacher(None, config(PAIR, kd=pair), None)
    named = TIMM | {"checkpoint": "run/digits/1029/net/ckpt/best.pth"}
    with pytest.raises(UserError, match="it is damaged"):  # the made-up file
        load_teacher(None, config(PAIR, kd=pair | {"teacher": named}), None)


def test_a_folder_of_the_same_networks_or_of_unknown_ones_is_accepted(tmp_path):
    for meant in (config(), config(model=TIMM), config(PAIR)):
        leave_a_run(meant)
        refuse_run_of_others(meant.run_dir, meant)
    refuse_other_teacher(config().run_dir, config().model)
    for content in (b"\xff", b"model: 3"):
        (tmp_path / "config.yml").write_bytes(content)
        refuse_run_of_others(tmp_path, config())
