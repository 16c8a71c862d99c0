"""Whether a run may go on from a checkpoint."""

import pytest
from toy_runs import RECIPE, toy_config

from utils.errors import UserError
from utils.run_folder.resume import FORMAT, Progress, check_checkpoint

STEPS = 5
CONFIG = toy_config(epochs=3).to_dict()


def checkpoint(phase=0, epoch=1, step=0, **changes):
    meter = {"names": ["loss/total"], "sums": None, "count": 0, "finite_steps": 0}
    content = {
        "format": FORMAT,
        "model": {},
        "extra": {},
        "optimizers": {"student": {}},
        "processes": [{"rng": {}, "meter": meter}],
        "progress": {"phase": phase, "epoch": epoch, "step": step},
        "gates": {},
        "val": {"loss/total": 1.0, "top1": 50.0},
        "best": {"top1": 50.0, "epoch": 1},
        "config": CONFIG,
        "data": {"classes": []},  # a further entry is none of its business
    }
    return content | changes


def refusal(content, config=CONFIG, epochs=(3,)):
    with pytest.raises(UserError) as error:
        check_checkpoint(content, config, epochs, STEPS)
    return str(error.value)


@pytest.mark.parametrize(
    ("phase", "epoch", "step", "epochs"),
    [(0, 0, 1, (3,)), (0, 2, 5, (3,)), (0, 3, 0, (3,)), (0, 1, 2, (2, 3)), (1, 0, 0, (2, 3)), (1, 3, 0, (2, 3))],
)
def test_any_step_of_a_run_can_be_gone_on_from(phase, epoch, step, epochs):
    found = check_checkpoint(checkpoint(phase, epoch, step), CONFIG, epochs, STEPS)
    assert found["progress"] == Progress(phase, epoch, step)
    assert found["data"] == {"classes": []}


DAMAGES = {
    "negative epoch": ({"progress": {"phase": 0, "epoch": -1, "step": 0}}, "progress.epoch: Input should be greater"),
    "negative step": ({"progress": {"phase": 0, "epoch": 0, "step": -1}}, "progress.step: Input should be greater"),
    "a word as epoch": ({"progress": {"phase": 0, "epoch": "x", "step": 0}}, "progress.epoch: Input should be a valid"),
    "number as progress": ({"progress": 3}, "progress: Input should be"),
    "a word as best": ({"best": "x"}, "best: Input should be"),
    "a word as best accuracy": ({"best": {"top1": "x", "epoch": 1}}, "best.top1: Input should be a valid number"),
    "best without epoch": ({"best": {"top1": 1.0}}, "best.epoch is missing"),
    "NaN as best": ({"best": {"top1": float("nan"), "epoch": 1}}, "best.top1: Input should be a finite number"),
    "a word as accuracy": ({"val": {"top1": "x"}}, "val.top1: Input should be a valid number"),
    "list as weights": ({"model": []}, "model: Input should be a valid dictionary"),
    "no process": ({"processes": []}, "processes: List should have at least 1 item"),
    "process without generators": ({"processes": [{"meter": {}}]}, "processes.0.rng is missing"),
    "another format": ({"format": FORMAT + 1}, "format: Input should be 1"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_a_sentence(name):
    changes, complaint = DAMAGES[name]
    assert f"it is damaged, or of another program: {complaint}" in refusal(checkpoint(**changes))


@pytest.mark.parametrize("key", sorted(checkpoint().keys() - {"data"}))
def test_a_missing_entry_is_named(key):
    content = checkpoint()
    del content[key]
    assert refusal(content) == f"it is damaged, or of another program: {key} is missing"


INCONSISTENT = [
    ((0, 10**9, 0), (3,), "training.epochs is 3, but 1000000000 epochs are done"),
    ((0, 4, 0), (3,), "training.epochs is 3, but 4 epochs are done; set training.epochs=4 or more"),
    ((0, 2, 0), (2, 3), "pretrain.epochs is 2, but 2 epochs are done; set pretrain.epochs=3 or more"),
    ((0, 1, 6), (3,), "it was written after step 6 of an epoch of 5 steps"),
    ((0, 3, 1), (3,), "training.epochs is 3, but 3 epochs and 1 steps of the next are done; set training.epochs=4 or"),
    ((2, 0, 0), (2, 3), "it is of a run with 3 phases or more, this one has 2"),
]


@pytest.mark.parametrize(("progress", "epochs", "complaint"), INCONSISTENT)
def test_a_checkpoint_of_a_step_that_this_run_does_not_have_is_refused(progress, epochs, complaint):
    assert complaint in refusal(checkpoint(*progress), epochs=epochs)


def test_the_batch_size_must_stay_in_the_middle_of_an_epoch():
    other = toy_config(epochs=3, batch_size=4).to_dict()
    check_checkpoint(checkpoint(step=0), other, (3,), STEPS)
    complaint = "training.batch_size is 4, but it was written in the middle of an epoch of batches of 8"
    assert complaint in refusal(checkpoint(step=3), other)


@pytest.mark.parametrize(
    ("optimizer", "complaint"),
    [
        ({"name": "SGD"}, "training.optimizer.name is SGD, but it is of a run with AdamW"),
        ({"name": "AdamW"}, "training.optimizer.options is {}, but it is of a run with {'betas': [0.9, 0.95]}"),
    ],
)
def test_a_run_cannot_change_its_optimizer(optimizer, complaint):
    content = checkpoint(config=toy_config(**RECIPE).to_dict())
    assert refusal(content, toy_config(**RECIPE | {"optimizer": optimizer}).to_dict()).startswith(complaint)
    check_checkpoint(content, toy_config(**RECIPE | {"lr": 0.1}).to_dict(), (3,), STEPS)


def test_settings_that_a_finished_run_cannot_use_any_more_are_refused():
    other = toy_config(epochs=3, lr=0.01, num_workers=1).to_dict()
    assert "it is of a finished run with training.lr=0.05, and 0.01 would have no effect" in refusal(
        checkpoint(epoch=3), other
    )
    check_checkpoint(checkpoint(epoch=2), other, (3,), STEPS)
    longer = toy_config(epochs=4, lr=0.01).to_dict()
    check_checkpoint(checkpoint(epoch=3), longer, (4,), STEPS)
    elsewhere = toy_config(epochs=3, num_workers=1).to_dict()
    check_checkpoint(checkpoint(epoch=3), elsewhere, (3,), STEPS)


def test_a_finished_run_without_an_accuracy_is_refused():
    assert "holds no accuracy" in refusal(checkpoint(epoch=3, val={}))
