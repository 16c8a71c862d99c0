"""Each group of parameters under the hyper-parameters that the config has for it."""

import copy

import pytest
import torch
from torch import nn

from utils.config import Config
from utils.training.optim import make_optimizers

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


LAYOUTS = [torch.contiguous_format, torch.channels_last]


class TestOnAGpu:
    """There the learning rate is a tensor, so that a captured step sees it change; tried out on a CPU."""

    @pytest.fixture(params=[False, True], ids=["from_cpu", "from_gpu"])
    def before(self, request, monkeypatch):
        """An optimiser after a step, of either kind."""
        return self.stepped(monkeypatch, on_gpu=request.param)

    @pytest.fixture(params=[False, True], ids=["to_cpu", "to_gpu"])
    def fresh(self, request, monkeypatch):
        return self.make(monkeypatch, on_gpu=request.param)

    def make(self, monkeypatch, on_gpu, layout=torch.contiguous_format):
        with monkeypatch.context() as patch:
            if on_gpu:
                patch.setattr(nn.Parameter, "is_cuda", True, raising=False)
            weights = torch.arange(54.0).view(2, 3, 3, 3).to(memory_format=layout)
            return make_optimizers({"student": [nn.Parameter(weights)]}, CONFIG)["student"]

    def stepped(self, monkeypatch, on_gpu):
        scheduled = self.make(monkeypatch, on_gpu)
        scheduled.start_epoch(3)
        step(scheduled)
        return scheduled

    def test_one_kernel_does_all_and_the_learning_rate_changes_in_place(self, monkeypatch):
        scheduled = self.make(monkeypatch, on_gpu=True)
        (group,) = scheduled.optimizer.param_groups
        rate = group["lr"]
        assert group["fused"] is True
        for epoch, expected in enumerate([1, 1, 1, 0.5, 0.5, 0.25]):
            scheduled.start_epoch(epoch)
            assert group["lr"] is rate
            assert rate.item() == expected

    def test_a_cpus_optimizers_are_left_alone(self, monkeypatch):
        (group,) = self.make(monkeypatch, on_gpu=False).optimizer.param_groups
        assert group["fused"] is None
        assert isinstance(group["lr"], float)

    def test_the_saved_state_has_plain_numbers_wherever_it_comes_from(self, before):
        (group,) = before.state_dict()["param_groups"]
        assert type(group["lr"]) is float
        assert group["lr"] == 0.5

    def test_goes_on_from_either_kind_as_the_kind_that_it_is(self, before, fresh):
        (group,) = fresh.optimizer.param_groups
        kind = {key: group[key] for key in ("fused", "foreach")}
        rate = group["lr"]
        fresh.load_state_dict(copy.deepcopy(before.state_dict()))
        (group,) = fresh.optimizer.param_groups
        assert {key: group[key] for key in kind} == kind
        assert group["lr"] is rate
        for scheduled in (before, fresh):
            scheduled.start_epoch(4)
            weights_of(scheduled).data.fill_(2.0)
            step(scheduled)
        torch.testing.assert_close(weights_of(fresh), weights_of(before))

    @pytest.mark.parametrize("layouts", [LAYOUTS, LAYOUTS[::-1]], ids=["to_channels_last", "from_channels_last"])
    def test_brings_momentum_into_the_layout_of_the_weights(self, monkeypatch, layouts):
        """Fused kernels would go through both as they lie in memory, and say nothing."""
        results = []
        for target in (layouts[0], layouts[1]):
            before, after = (self.make(monkeypatch, on_gpu=True, layout=layout) for layout in (layouts[0], target))
            step(before)
            after.load_state_dict(before.state_dict())
            step(after)
            assert after.optimizer.state[weights_of(after)]["momentum_buffer"].is_contiguous(memory_format=target)
            results.append(weights_of(after))
        torch.testing.assert_close(*results)


def weights_of(scheduled):
    return scheduled.optimizer.param_groups[0]["params"][0]


def step(scheduled):
    weights_of(scheduled).grad = weights_of(scheduled).detach().sin()
    scheduled.optimizer.step()
