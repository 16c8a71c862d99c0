"""What stands between a validated config and the engine."""

import multiprocessing
import sys

import pytest
from process_runs import config_file, prepare
from toy_runs import toy_config

from utils.config import load_config
from utils.config.changes import differences
from utils.errors import UserError
from utils.training.reporter import Reporter
from utils.training.run import changed_settings, train


def checkpoint(step):
    return {"config": toy_config().to_dict(), "progress": {"phase": 0, "epoch": 1, "step": step}}


def test_the_settings_of_a_resumed_run_that_have_changed_are_found():
    changes = changed_settings(checkpoint(step=0), toy_config(lr=0.01, epochs=9))
    assert changes["training.lr"] == (0.05, 0.01)
    assert changes["training.epochs"] == (3, 9)


def test_an_option_that_is_left_out_is_a_change():
    with_option, without = ({"kd_loss": {"logits_options": options}} for options in ({"nontarget": 2.0}, {}))
    assert differences(with_option, without) == {"kd_loss.logits_options": ({"nontarget": 2.0}, {})}
    assert differences(without, with_option) == {"kd_loss.logits_options": ({}, {"nontarget": 2.0})}


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_a_run_that_cannot_be_resumed_as_asked_stays_as_it_is(tmp_path, capsys):
    path = config_file(prepare(tmp_path), "cc", training={"epochs": 1, "lr_decay_epochs": []})
    config = load_config(path)
    train(config)
    before = files_of(config.run_dir)
    capsys.readouterr()
    with pytest.raises(UserError, match=r"not of this configuration \(.*kd_loss.feat_dim is 64, it was 128"):
        train(load_config(path, ["kd_loss.feat_dim=64", "training.epochs=2"]), resume=True)
    assert files_of(config.run_dir) == before
    assert "resumed" not in capsys.readouterr().out
    elsewhere = load_config(path, ["training.seed=7"])
    with pytest.raises(UserError, match="nothing to resume there"):
        train(elsewhere, resume=True)
    assert not elsewhere.run_dir.exists()


def test_the_batch_size_must_stay_in_the_middle_of_an_epoch():
    changed_settings(checkpoint(step=0), toy_config(batch_size=4))
    with pytest.raises(UserError, match=r"found 4, .* batches of 8; resume with training.batch_size=8"):
        changed_settings(checkpoint(step=3), toy_config(batch_size=4))


def test_a_key_that_an_older_config_did_not_have_is_no_difference():
    assert differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3, "new": 4}, "c": 2}) == {"a.b": (1, 3)}


def test_no_worker_outlives_a_run_whoever_still_knows_the_engine(tmp_path, monkeypatch):
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
