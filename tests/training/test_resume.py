"""Whether a run may go on from a checkpoint."""

from pathlib import Path

import pytest
from toy_runs import RECIPE, toy_config

from utils.errors import UserError
from utils.run_folder.resume import FORMAT, check_checkpoint

IMAGES = 40
CONFIG = toy_config(epochs=3).to_dict()
WITH_RECIPE = toy_config(**RECIPE).to_dict()


def checkpoint(phase=0, epoch=1, step=0, **changes):
    content = {
        "format": FORMAT,
        "progress": {"phase": phase, "epoch": epoch, "step": step},
        "gates": {"sample_seen": [0] * IMAGES},
        "optimizers": {"student": {"state": {0: {}}, "param_groups": [{"momentum": 0.9, "nesterov": False}]}},
        "config": CONFIG,
    }
    return content | changes


def without_states(*progress, **group):
    optimizer = {"state": {}, "param_groups": [{"momentum": 0.9, "nesterov": False} | group]}
    return checkpoint(*progress, optimizers={"agent": optimizer})


def changed(section, **changes):
    return CONFIG | {section: CONFIG[section] | changes}


def with_recipe(**changes):
    return toy_config(**RECIPE | changes).to_dict()


def check(content, config=CONFIG, epochs=(3,)):
    check_checkpoint(content, config, epochs, IMAGES, Path("run"))


@pytest.mark.parametrize(
    "how",
    [
        *((checkpoint(0, *progress),) for progress in ((0, 1), (2, 5), (3, 0))),
        *((checkpoint(*progress), CONFIG, (2, 3)) for progress in ((0, 1, 2), (1, 0, 0), (1, 3, 0))),
        (checkpoint(0, 0, 1), changed("pretrain", epochs=1), (1, 3)),
        (without_states(0, 0, 1, momentum=0),),  # there is nothing to remember
        (without_states(1, 0, 0), CONFIG, (2, 3)),  # or not yet
        (checkpoint(), changed("training", batch_size=4)),
        (checkpoint(), changed("dataset", sampler="balanced")),
        (checkpoint(config=WITH_RECIPE), with_recipe(lr=0.1)),
        (checkpoint(epoch=2), changed("training", lr=0.01)),
        (checkpoint(epoch=3), changed("training", lr=0.01, epochs=4), (4,)),
        (checkpoint(epoch=3), changed("training", num_workers=1)),
    ],
)
def test_any_step_can_be_gone_on_from_with_settings_that_still_have_an_effect(how):
    check(*how)


@pytest.mark.parametrize(
    ("complaint", "how"),
    [
        ("going on from its checkpoint failed: KeyError: 'progress'", ({"format": FORMAT, "config": CONFIG},)),
        ("its format is 2, this version reads 1", (checkpoint(format=FORMAT + 1),)),
        ("training.epochs is 3, but 4 epochs are done; set training.epochs=4 or more", (checkpoint(0, 4, 0),)),
        ("pretrain.epochs is 2, but 2 epochs are done; set pretrain.ep", (checkpoint(0, 2, 0), CONFIG, (2, 3))),
        ("trained on 39 images, here are 40; --overwrite starts", (checkpoint(gates={"sample_seen": [0] * 39}),)),
        ("3 epochs and 1 steps of the next are done; set training.epochs=4 or", (checkpoint(0, 3, 1),)),
        ("it is of a run with 3 phases or more, this one has 2", (checkpoint(2, 0, 0), CONFIG, (2, 3))),
        ("over after 2; set pretrain.epochs=2", (checkpoint(1), changed("pretrain", epochs=1), (1, 3))),
        *(
            ("it lacks the state of the optimiser of agent", (without_states(*progress), CONFIG, (3, 3)))
            for progress in ((0, 0, 1), (0, 1, 0), (1, 2, 3))
        ),
        ("batch_size is 4, but .* in the middle of an .* 8", (checkpoint(step=3), changed("training", batch_size=4))),
        ("sampler is balanced, but .* with shuffled", (checkpoint(step=3), changed("dataset", sampler="balanced"))),
        ("name is SGD, .* AdamW", (checkpoint(config=WITH_RECIPE), with_recipe(optimizer={"name": "SGD"}))),
        (r"is {}, .* {betas: \[0", (checkpoint(config=WITH_RECIPE), with_recipe(optimizer={"name": "AdamW"}))),
        ("with training.lr=0.05, and 0.01 would have", (checkpoint(epoch=3), changed("training", lr=0.01))),
    ],
)
def test_a_checkpoint_that_does_not_fit_or_lacks_something_is_refused(complaint, how):
    with pytest.raises(UserError, match=complaint):
        check(*how)
