"""What stands between a validated config and the engine."""

import logging

import pytest
from test_engine import toy_config

from utils.cli import teacher_arguments
from utils.config.changes import differences
from utils.errors import UserError
from utils.runs import check_unchanged


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


def test_the_teachers_training_shares_the_data_and_the_device_of_the_students():
    model, dataset, seed, *keys = teacher_arguments(toy_config(device="cpu", seed=7))
    assert (model, dataset, seed) == ("resnet8", "digits", "7")
    assert {'dataset.root="data"', 'training.device="cpu"', 'training.precision="fp32"', 'run.root="run"'} <= set(keys)
