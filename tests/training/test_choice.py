"""Telling that a policy does not choose, in the last lines of a run too."""

import pytest
from toy_runs import toy_config

from utils.run_folder.choice import no_choice
from utils.run_folder.folder import RunDir
from utils.training.run import farewell


def epochs(*shares):
    """Records of epochs with these shares of samples, per spot."""
    return [
        {"epoch": k, "train": {"loss/total": 1.0, **{f"gate/f{n}": share for n, share in enumerate(of_epoch)}}}
        for k, of_epoch in enumerate(shares, 1)
    ]


@pytest.mark.parametrize(
    ("selection", "shares", "sentence"),
    [
        (
            "adaptive",
            [(1.0, 0.9), (0.996, 1.0), (1.0, 1.0)],
            "the policy distilled everywhere (>= 99.5 % at every spot) since epoch 2, as fixed does",
        ),
        (
            "anti",
            [(0.0, 0.9), (0.1, 0.0), (0.0, 0.004)],
            "the opposite of the policy distilled nowhere (<= 0.5 % at every spot) since epoch 3, "
            "as if there were no teacher",
        ),
        ("adaptive", [(1.0, 1.0), (1.0, 0.99)], "None"),
        ("fixed", [(1.0, 1.0)], "None"),
        ("adaptive", [], "None"),
    ],
)
def test_a_policy_that_does_not_choose_is_told_with_the_epoch_from_which_on(selection, shares, sentence):
    assert str(no_choice(selection, epochs(*shares))) == sentence


def test_the_end_of_a_run_says_so(tmp_path):
    run = RunDir(tmp_path)
    lines = [
        '{"phase": "pretrain", "epoch": 1, "seconds": 1, "train": {"loss/total": 1}}',
        *(
            f'{{"phase": "train", "epoch": {k}, "seconds": 1, "train": {{"loss/total": 1, "gate/f1": {share}}}, '
            '"val": {"loss/total": 1, "top1": 50}}'
            for k, share in ((1, 0.5), (2, 1), (3, 1))
        ),
    ]
    run.metrics.write_text("".join(f"{line}\n" for line in lines))
    result = {"best_top1": 50.0, "best_epoch": 1, "last_top1": 50.0, "checkpoint": "best.pth"}
    assert "distilled everywhere (>= 99.5 % at every spot) since epoch 2" in farewell(toy_config(), result, run)
