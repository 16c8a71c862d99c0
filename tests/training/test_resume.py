"""Whether a run may go on from a checkpoint."""

from pathlib import Path

import pytest
from toy_runs import RECIPE, toy_config

from utils.errors import UserError
from utils.run_folder.resume import FORMAT, check_checkpoint

STEPS = 5
CONFIG = toy_config(epochs=3).to_dict()


def checkpoint(phase=0, epoch=1, step=0, **changes):
    content = {
        "format": FORMAT,
        "progress": {"phase": phase, "epoch": epoch, "step": step},
        "val": {"loss/total": 1.0, "top1": 50.0},
        "optimizers": {"student": {"state": {0: {}}, "param_groups": [{"momentum": 0.9, "nesterov": False}]}},
        "config": CONFIG,
    }
    return content | changes


def check(content, config=CONFIG, epochs=(3,)):
    check_checkpoint(content, config, epochs, STEPS, Path("run"))


def refuse(complaint, content, config=CONFIG, epochs=(3,)):
    with pytest.raises(UserError, match=complaint):
        check(content, config, epochs)


@pytest.mark.parametrize(
    ("phase", "epoch", "step", "epochs"),
    [(0, 0, 1, (3,)), (0, 2, 5, (3,)), (0, 3, 0, (3,)), (0, 1, 2, (2, 3)), (1, 0, 0, (2, 3)), (1, 3, 0, (2, 3))],
)
def test_any_step_of_a_run_can_be_gone_on_from(phase, epoch, step, epochs):
    check(checkpoint(phase, epoch, step), epochs=epochs)


@pytest.mark.parametrize(
    ("content", "epochs", "complaint"),
    [
        ({"format": FORMAT, "config": CONFIG}, (3,), "going on from its checkpoint failed: KeyError: 'progress'"),
        (checkpoint(format=FORMAT + 1), (3,), "its format is 2, this version reads 1"),
        (checkpoint(epoch=3, val={}), (3,), "holds no accuracy"),
        (checkpoint(0, -1, 0), (3,), "it is damaged"),
        (checkpoint(0, 4, 0), (3,), "training.epochs is 3, but 4 epochs are done; set training.epochs=4 or more"),
        (checkpoint(0, 2, 0), (2, 3), "pretrain.epochs is 2, but 2 epochs are done; set pretrain.epochs=3 or more"),
        (checkpoint(0, 1, 6), (3,), "it was written after step 6 of an epoch of 5 steps"),
        (checkpoint(0, 3, 1), (3,), "3 epochs and 1 steps of the next are done; set training.epochs=4 or"),
        (checkpoint(2, 0, 0), (2, 3), "it is of a run with 3 phases or more, this one has 2"),
    ],
)
def test_a_checkpoint_that_does_not_fit_or_lacks_something_is_refused(content, epochs, complaint):
    refuse(complaint, content, epochs=epochs)


def test_a_phase_that_is_over_keeps_its_number_of_epochs():
    other = CONFIG | {"pretrain": CONFIG["pretrain"] | {"epochs": 1}}
    check(checkpoint(phase=0, epoch=0, step=1), other, (1, 3))
    refuse("that phase is over after 2; set pretrain.epochs=2", checkpoint(phase=1), other, (1, 3))


@pytest.mark.parametrize("progress", [(0, 0, 1), (0, 1, 0), (1, 2, 3)])
def test_a_checkpoint_without_what_the_optimisers_remember_is_refused(progress):
    group = {"momentum": 0.9, "nesterov": False}
    content = checkpoint(*progress, optimizers={"agent": {"state": {}, "param_groups": [group]}})
    refuse("it lacks the state of the optimiser of agent", content, epochs=(3, 3))
    group["momentum"] = 0  # there is nothing to remember
    check(content, epochs=(3, 3))


def test_a_phase_that_has_not_begun_remembers_nothing():
    check(checkpoint(1, 0, 0, optimizers={"student": {"state": {}, "param_groups": [{}]}}), epochs=(2, 3))


@pytest.mark.parametrize(
    ("section", "change", "complaint"),
    [
        ("training", {"batch_size": 4}, "training.batch_size is 4, but .* in the middle of an epoch with 8"),
        (
            "dataset",
            {"sampler": "balanced"},
            "dataset.sampler is balanced, but .* in the middle of an epoch with shuffled",
        ),
    ],
)
def test_the_batches_must_stay_in_the_middle_of_an_epoch(section, change, complaint):
    other = CONFIG | {section: CONFIG[section] | change}
    check(checkpoint(step=0), other)
    refuse(complaint, checkpoint(step=3), other)


@pytest.mark.parametrize(
    ("optimizer", "complaint"),
    [
        ({"name": "SGD"}, "training.optimizer.name is SGD, but it is of a run with AdamW"),
        ({"name": "AdamW"}, r"training.optimizer.options is {}, but it is of a run with {betas: \[0.9, 0.95\]}"),
    ],
)
def test_a_run_cannot_change_its_optimizer(optimizer, complaint):
    content = checkpoint(config=toy_config(**RECIPE).to_dict())
    refuse(complaint, content, toy_config(**RECIPE | {"optimizer": optimizer}).to_dict())
    check(content, toy_config(**RECIPE | {"lr": 0.1}).to_dict())


def test_settings_that_a_finished_run_cannot_use_any_more_are_refused():
    slower, longer = (toy_config(epochs=epochs, lr=0.01).to_dict() for epochs in (3, 4))
    refuse("finished run with training.lr=0.05, and 0.01 would have no effect", checkpoint(epoch=3), slower)
    check(checkpoint(epoch=2), slower)
    check(checkpoint(epoch=3), longer, (4,))
    check(checkpoint(epoch=3), toy_config(epochs=3, num_workers=1).to_dict())
