"""Each group of parameters under the hyper-parameters that the config has for it."""

import copy
from typing import get_args

import pytest
import torch
from torch import nn

from utils.config import Config
from utils.config.training import Optimizer
from utils.errors import UserError
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


def configured(**training):
    training = {"lr": 0.1, "epochs": 10} | training
    return Config.from_dict({"dataset": {"name": "digits"}, "training": training, "model": {"name": "resnet8"}})


def made(group="model", start=None, **training):
    weights = torch.linspace(-1, 1, 8).view(2, 4) if start is None else start.clone()
    return make_optimizers({group: [nn.Parameter(weights)]}, configured(**training))[group]


class TestKinds:
    def test_are_named_as_in_pytorch_whatever_the_case(self):
        assert type(made(optimizer={"name": "adamw"}).optimizer) is torch.optim.AdamW

    @pytest.mark.parametrize("group", ["student", "agent"])
    def test_are_the_same_for_the_student_and_the_policy(self, group):
        optimizer = {"name": "AdamW", "options": {"betas": [0.5, 0.6]}, "weight_decay_agent": 0.3}
        (used,) = made(group, optimizer=optimizer | {"weight_decay_stage2": 0.3}).optimizer.param_groups
        assert (*used["betas"], used["weight_decay"]) == (0.5, 0.6, 0.3)

    def test_do_not_change_the_pretraining_of_a_distiller(self):
        assert type(made("pretrain", optimizer={"name": "AdamW"}).optimizer) is torch.optim.SGD

    def test_include_nesterovs_momentum(self):
        (used,) = made(optimizer={"nesterov": True}).optimizer.param_groups
        assert used["nesterov"] is True

    @pytest.mark.parametrize("name", get_args(Optimizer))
    def test_go_on_from_a_saved_state_as_if_nothing_had_happened(self, name):
        optimizer = {"name": name}
        whole = made(optimizer=optimizer)
        for _ in range(4):
            step(whole)
        first = made(optimizer=optimizer)
        step(first)
        step(first)
        state = copy.deepcopy(first.state_dict())
        assert state["state"]
        second = made(optimizer=optimizer, start=weights_of(first).detach())
        second.load_state_dict(state)
        step(second)
        step(second)
        assert torch.equal(weights_of(second), weights_of(whole))
        again = second.state_dict()["state"][0]
        assert {key: value.dtype for key, value in again.items()} == {
            key: value.dtype for key, value in whole.state_dict()["state"][0].items()
        }

    @pytest.mark.parametrize(
        ("options", "complaint"),
        [
            ({"beta": [0.9, 0.95]}, "found 'beta', must be of AdamW's betas, eps, amsgrad"),
            ({"lr": 0.1}, "found 'lr', must be of AdamW's betas"),
            ({"fused": True}, "found 'fused', must be of AdamW's betas"),
            ({"betas": 0.9}, "AdamW does not take {'betas': 0.9} ("),
            ({"betas": [0.9]}, "AdamW does not take {'betas': [0.9]} ("),
            ({"eps": -1}, "AdamW does not take {'eps': -1} (Invalid epsilon value: -1"),
        ],
    )
    def test_refuse_wrong_options_in_a_line(self, options, complaint):
        with pytest.raises(UserError) as error:
            made(optimizer={"name": "AdamW", "options": options})
        assert str(error.value).startswith(f"training.optimizer.options: {complaint}")
        assert "\n" not in str(error.value)

    def test_momentum_of_sgd_is_no_option(self):
        with pytest.raises(UserError, match="found 'momentum', must be of SGD's dampening, maximize"):
            made(optimizer={"options": {"momentum": 0.5}})

    def test_settings_of_a_resumed_run_are_those_of_its_config(self):
        before, after = made(optimizer={"weight_decay": 0.1}), made(optimizer={"weight_decay": 0.2})
        step(before)
        after.load_state_dict(before.state_dict())
        assert after.optimizer.param_groups[0]["weight_decay"] == 0.2


class TestSchedule:
    def test_cosine_is_that_of_pytorch(self):
        scheduled = made(schedule="cosine")
        theirs = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([nn.Parameter(torch.ones(1))], 0.1), 10)
        for epoch in range(10):
            assert scheduled.lr_at(epoch) == pytest.approx(theirs.get_last_lr()[0])
            theirs.optimizer.step()
            theirs.step()

    @pytest.mark.parametrize("group", ["model", "agent"])
    def test_warm_up_rises_linearly_to_the_full_rate(self, group):
        scheduled = made(group, warmup_epochs=3, lr=0.4, lr_agent=0.4, lr_decay_epochs=[5])
        rates = [scheduled.lr_at(epoch) for epoch in range(6)]
        assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.04])

    def test_cosine_begins_after_the_warm_up(self):
        scheduled = made(warmup_epochs=2, schedule="cosine", lr=1.0)
        assert [scheduled.lr_at(epoch) for epoch in (2, 6)] == pytest.approx([1.0, 0.5])
        assert 0 < scheduled.lr_at(9) < 0.05


class TestClipping:
    def test_limits_the_norm_of_all_gradients_of_the_student_together(self):
        scheduled = made(clip_grad_norm=0.5, lr=1.0, optimizer={"weight_decay": 0, "momentum": 0})
        before = weights_of(scheduled).detach().clone()
        step(scheduled)
        assert (weights_of(scheduled) - before).norm().item() == pytest.approx(0.5, rel=1e-4)

    def test_leaves_the_policy_alone(self):
        assert made("agent", clip_grad_norm=0.5).clip_norm == 0
        assert made("student", clip_grad_norm=0.5).clip_norm == 0.5


def weights_of(scheduled):
    return scheduled.optimizer.param_groups[0]["params"][0]


def step(scheduled):
    weights_of(scheduled).grad = weights_of(scheduled).detach().sin()
    scheduled.step()
