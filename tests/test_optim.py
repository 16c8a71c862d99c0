"""Each group of parameters under the hyper-parameters that the config has for it."""

import pytest
import torch
from torch import nn

from utils.config import Config
from utils.optim import make_optimizers

CONFIG = Config.from_dict(
    {
        "dataset": {"name": "digits"},
        "training": {
            "optimizer": {
                "momentum": 0.8,
                "weight_decay": 0.01,
                "weight_decay_stage2": 0.02,
                "weight_decay_agent": 0.03,
            },
            "lr": 1.0,
            "lr_agent": 2.0,
            "lr_decay_epochs": [3, 5],
            "lr_agent_decay_epochs": [4],
            "lr_decay_rate": 0.5,
            "epochs": 6,
        },
        "model": {"name": "resnet8"},
        "pretrain": {"optimizer": {"lr": 3.0, "momentum": 0.7, "weight_decay": 0.04}},
    }
)


@pytest.mark.parametrize(
    ("group", "momentum", "weight_decay", "rates"),
    [
        ("model", 0.8, 0.01, [1, 1, 1, 0.5, 0.5, 0.25]),
        ("student", 0.8, 0.02, [1, 1, 1, 0.5, 0.5, 0.25]),
        ("agent", 0.8, 0.03, [2, 2, 2, 2, 1, 1]),
        ("pretrain", 0.7, 0.04, [3, 3, 3, 3, 3, 3]),
    ],
)
def test_a_group_is_trained_as_the_config_says(group, momentum, weight_decay, rates):
    parameter = nn.Parameter(torch.zeros(1))
    scheduled = make_optimizers({group: [parameter]}, CONFIG)[group]
    (used,) = scheduled.optimizer.param_groups
    assert used["params"] == [parameter]
    assert (used["momentum"], used["weight_decay"]) == (momentum, weight_decay)
    for epoch, rate in enumerate(rates):
        scheduled.start_epoch(epoch)
        assert used["lr"] == rate
