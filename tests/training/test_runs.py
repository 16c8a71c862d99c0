"""What stands between a validated config and the engine."""

import logging
import multiprocessing
import sys

import pytest
from process_runs import config_file, prepare
from toy_runs import toy_config

from utils.config import load_config
from utils.config.changes import differences
from utils.errors import UserError
from utils.training.reporter import Reporter
from utils.training.run import check_unchanged, train


def checkpoint(step):
    return {"config": toy_config().to_dict(), "progress": {"phase": 0, "epoch": 1, "step": step}}


def test_a_resumed_run_says_which_settings_have_changed(caplog):
    caplog.set_level(logging.INFO, "sakd")
    check_unchanged(checkpoint(step=0), toy_config(lr=0.01, epochs=9))
    assert "resumed with training.lr 0.01, which was 0.05" in caplog.messages
    assert "resumed with training.epochs 9, which was 3" in caplog.messages


def test_the_batch_size_must_stay_in_the_middle_of_an_epoch():
    check_unchanged(checkpoint(step=0), toy_config(batch_size=4))
    with pytest.raises(UserError, match=r"found 4, .* batches of 8; resume with training.batch_size=8"):
        check_unchanged(checkpoint(step=3), toy_config(batch_size=4))


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
