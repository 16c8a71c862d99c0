"""Drops of the learning rate keep their shares where the command line changes the number of epochs."""

import logging

import pytest

from utils.config import find_config, load_config
from utils.files import warn_once

FILE = "dataset: {name: digits}\nmodel: {name: resnet8}\n"
SHORT = FILE + "training: {epochs: 20, lr_decay_epochs: [14, 18]}\n"
BOTH = FILE + "training: {epochs: 20, lr_decay_epochs: [14, 18], lr_agent_decay_epochs: [10]}\n"


@pytest.mark.parametrize(
    ("text", "words", "drops", "of_agent"),
    [
        (SHORT, ["training.epochs=30"], (21, 27), (21, 27)),
        (BOTH, ["training.epochs=30"], (21, 27), (15,)),
        (FILE, ["training.epochs=24"], (15, 18, 21), (15, 18, 21)),
        (SHORT, ["training.epochs=1"], (1,), (1,)),
        (SHORT, ["training.epochs=20"], (14, 18), (14, 18)),
        (SHORT, ["training={epochs: 40}"], (28, 36), (28, 36)),
        (SHORT, ["training.epochs=30", "training.lr_decay_epochs=[5]"], (5,), (5,)),
        (SHORT, ["training={epochs: 30, lr_decay_epochs: [5], lr_agent_decay_epochs: null}"], (5,), (5,)),
        (BOTH, ["training.epochs=30", "training.lr_decay_epochs=[5]"], (5,), (15,)),
        (SHORT, ["training.epochs=30", "training.schedule=cosine"], (14, 18), (14, 18)),
        (SHORT, ["training.lr=0.1"], (14, 18), (14, 18)),
    ],
)
def test_drops_of_a_file_or_a_default_are_scaled_and_those_of_the_command_line_are_not(
    text, words, drops, of_agent, tmp_path
):
    file = tmp_path / "config.yml"
    file.write_text(text)
    training = load_config(file, words).training
    assert (training.lr_decay_epochs, training.lr_agent_decay_epochs) == (drops, of_agent)


def test_one_line_says_so(caplog):
    caplog.set_level(logging.INFO)
    warn_once.cache_clear()  # another test may have asked for the same
    composed = find_config("digits", 1029, teacher="resnet20", student="resnet8", distiller="at")
    composed.load()
    assert caplog.messages == []
    for _ in range(2):
        composed.load(["training.epochs=60"])
    (line,) = caplog.messages
    assert line == f"{composed.name}: training.lr_decay_epochs: [42, 54], scaled from [14, 18] of 20 epochs to 60"
