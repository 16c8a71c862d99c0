"""What stands between a validated config and the engine."""

import math
import multiprocessing
import re
import shutil
import sys

import pytest
import torch
from process_runs import config_file, prepare

from utils.config import load_config
from utils.config.changes import differences
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.reporter import Reporter
from utils.training.run import train


def test_an_option_that_is_left_out_is_a_change_and_a_key_that_an_older_config_did_not_have_is_none():
    with_option, without = ({"kd_loss": {"logits_options": options}} for options in ({"nontarget": 2.0}, {}))
    assert differences(with_option, without) == {"kd_loss.logits_options": ({"nontarget": 2.0}, {})}
    assert differences(without, with_option) == {"kd_loss.logits_options": ({}, {"nontarget": 2.0})}
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3, "new": 4}, "c": 2}) == {"a.b": (1, 3)}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A config file, and the folder of its finished run of one epoch."""
    path = config_file(prepare(tmp_path_factory.mktemp("run")), "cc", training={"epochs": 1, "lr_decay_epochs": []})
    config = load_config(path)
    train(config)
    return path, config.run_dir


@pytest.mark.parametrize(
    ("words", "damage", "complaint"),
    [
        (["kd_loss.feat_dim=64", "training.epochs=2"], {}, "kd_loss.feat_dim is 64, it was 128"),
        ([], {"best": "x"}, "its checkpoint is not of this configuration"),
    ],
)
def test_a_run_that_cannot_be_resumed_as_asked_stays_as_it_is(words, damage, complaint, finished, tmp_path, capsys):
    path, folder = finished
    config = load_config(path, [*words, f"run.root={tmp_path}"])
    shutil.copytree(folder, config.run_dir)
    last = config.run_dir / "ckpt" / "last.pth"
    torch.save(torch.load(last, weights_only=False) | damage, last)
    before = files_of(config.run_dir)
    with pytest.raises(UserError, match=re.escape(complaint)):
        train(config, resume=True)
    assert files_of(config.run_dir) == before
    assert "resumed" not in capsys.readouterr().out


def test_a_resumed_run_says_which_settings_have_changed(finished, tmp_path, capsys):
    path, folder = finished
    words = ["training.epochs=2", "training.lr=0.01", f"run.root={tmp_path}"]
    config = load_config(path, words)
    shutil.copytree(folder, config.run_dir)
    train(config, resume=True)
    shown = capsys.readouterr().out
    assert "resumed with training.lr 0.01, which was 0.05" in shown
    assert "resumed with training.epochs 2, which was 1" in shown


def test_a_distiller_remembers_the_images_alone_that_can_be_read(tmp_path):
    keys = {"training": {"epochs": 1, "lr_decay_epochs": []}, "dataset": {"on_corrupt": "skip"}}
    config = load_config(config_file(prepare(tmp_path), "crd", **keys))
    (tmp_path / "images/train/ant/003.png").write_text("no picture")
    train(config)
    extra = read_checkpoint(RunDir(config.run_dir).last)["extra"]
    assert len(extra["distiller.contrasts.0.student_bank.rows"]) == 63


def test_a_teacher_whose_logits_are_not_finite_is_refused_by_name(finished, tmp_path, monkeypatch):
    config = load_config(finished[0], [f"run.root={tmp_path}"])
    monkeypatch.setattr("utils.training.build.evaluate", lambda *how: {"loss/total": math.nan, "top1": 50.0})
    with pytest.raises(UserError, match=r"the logits of the teacher resnet8 for the validation images are not finite"):
        train(config)
    assert not config.run_dir.exists()


def test_where_there_is_nothing_to_resume_nothing_is_made_or_decoded(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.training.run.fit", None)
    config = load_config(finished[0], [f"run.root={tmp_path}"])
    with pytest.raises(UserError, match="nothing to resume there"):
        train(config, resume=True)
    assert not any(tmp_path.iterdir())


def test_no_worker_outlives_a_run_though_the_engine_lives_on(tmp_path, monkeypatch):
    """Modules that are first imported under it may keep its frames alive, in circles that nobody has collected yet."""
    frames = []
    close = Reporter.close
    monkeypatch.setattr(Reporter, "close", lambda self: frames.append(sys._getframe()) or close(self))
    keys = {"epochs": 1, "lr_decay_epochs": [], "num_workers": 1}
    train(load_config(config_file(prepare(tmp_path), dataset={"loader": "stream"}, training=keys)))
    assert frames
    left = multiprocessing.active_children()
    for worker in left:
        worker.kill()  # or these tests would never end
    assert left == []
