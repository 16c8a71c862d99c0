"""Telling that a policy does not choose, in the last lines of a run too."""

import json

import pytest
from toy_runs import toy_config
from toys import toy_task

from utils.run_folder.choice import no_choice
from utils.run_folder.folder import RunDir
from utils.training.run import describe_result


def epochs(*shares):
    """Records of epochs with these shares of samples, per spot."""
    common = {"phase": "train", "seconds": 1}
    gates = [{f"gate/f{n}": share for n, share in enumerate(of_epoch)} for of_epoch in shares]
    return [common | {"epoch": k, "train": {"loss/total": 1.0} | of_epoch} for k, of_epoch in enumerate(gates, 1)]


@pytest.mark.parametrize(
    ("selection", "shares", "found"),
    [
        ("adaptive", [(1.0, 0.9), (0.996, 1.0), (1.0, 1.0)], "everywhere since 2"),
        ("anti", [(0.0, 0.9), (0.1, 0.0), (0.0, 0.004)], "nowhere since 3"),
        ("adaptive", [(1.0, 1.0), (1.0, 0.99)], None),
        ("fixed", [(1.0, 1.0)], None),
        ("adaptive", [], None),
    ],
)
def test_a_policy_that_does_not_choose_is_told_with_the_epoch_from_which_on(selection, shares, found):
    assert no_choice(selection, epochs(*shares)) == found


def test_the_end_of_a_run_says_so_and_how_far_beta_is_above_its_limit_as_far_as_it_has_grown(tmp_path):
    run, records = RunDir(tmp_path), epochs((0.5,), (1,), (1,))
    records[-1]["train"]["weight/f0"] = 0.05
    run.metrics.write_text("".join(f"{json.dumps(epoch)}\n" for epoch in records))
    result = {"best_top1": 50.0, "best_epoch": 1, "last_top1": 50.0, "checkpoint": "best.pth"}
    task = toy_task("at", beta=1000.0, warmup_epochs=4)
    task.start_epoch(1)
    said = describe_result(toy_config(), result, run, task)
    assert "no choice: from epoch 2 on the student was distilled everywhere, whatever the sample" in said
    assert "β 500 is 20 times too much at f0" in said
