"""Each group of parameters under the hyper-parameters that the config has for it."""

import copy
from typing import get_args

import pytest
import torch
from captured_steps import use_optimizers_of_a_gpu
from torch import nn

from utils.config import Config
from utils.config.training import Optimizer
from utils.errors import UserError
from utils.training.optim import check_options, make_optimizers

DECAYS = {"weight_decay": 0.01, "weight_decay_stage2": 0.02, "weight_decay_agent": 0.03}
RATES = {"lr": 1.0, "lr_agent": 2.0, "lr_decay_epochs": [3, 5], "lr_agent_decay_epochs": [4], "lr_decay_rate": 0.5}
WEIGHTS = torch.linspace(-1, 1, 54).view(2, 3, 3, 3)


def made(group="model", start=WEIGHTS, on_gpu=False, **training):
    """On a GPU the learning rate is a tensor, so that a captured step sees it change; tried out on a CPU."""
    config = Config.from_dict(
        {
            "dataset": {"name": "digits"},
            "training": {"lr": 0.1, "epochs": 10} | training,
            "model": {"name": "resnet8"},
            "pretrain": {"optimizer": {"lr": 3.0, "momentum": 0.7, "weight_decay": 0.04}},
        }
    )
    check_options(config.training.optimizer)
    with pytest.MonkeyPatch.context() as patch:
        if on_gpu:
            use_optimizers_of_a_gpu(patch)
        return make_optimizers({group: [nn.Parameter(start.clone())]}, config)[group]


def weights_of(scheduled):
    return scheduled.optimizer.param_groups[0]["params"][0]


def step(scheduled, times=1):
    for _ in range(times):
        weights_of(scheduled).grad = weights_of(scheduled).detach().sin()
        scheduled.step()


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
    scheduled = made(group, optimizer={"momentum": 0.8, "nesterov": True} | DECAYS, epochs=6, **RATES)
    (used,) = scheduled.optimizer.param_groups
    assert (used["momentum"], used["weight_decay"]) == (momentum, weight_decay)
    assert used["nesterov"] is (group != "pretrain")
    for epoch, rate in enumerate(rates):
        scheduled.start_epoch(epoch)
        assert used["lr"] == rate


class TestOnAGpu:
    @pytest.mark.parametrize("on_gpu", [False, True])
    def test_one_kernel_does_all_and_the_learning_rate_changes_in_place(self, on_gpu):
        scheduled = made("student", on_gpu=on_gpu, **RATES)
        (group,) = scheduled.optimizer.param_groups
        rate = group["lr"]
        assert (group["fused"], isinstance(rate, torch.Tensor)) == ((True, True) if on_gpu else (None, False))
        scheduled.start_epoch(5)
        assert group["lr"] == 0.25
        assert group["lr"] is rate or not on_gpu

    @pytest.mark.parametrize("from_gpu", [False, True])
    @pytest.mark.parametrize("to_gpu", [False, True])
    def test_goes_on_from_either_kind_as_the_kind_that_it_is(self, from_gpu, to_gpu):
        before, fresh = (made("student", on_gpu=on_gpu, **RATES) for on_gpu in (from_gpu, to_gpu))
        before.start_epoch(3)
        step(before)
        state = copy.deepcopy(before.state_dict())
        assert state["param_groups"][0]["lr"] == 0.5
        assert type(state["param_groups"][0]["lr"]) is float
        (group,) = fresh.optimizer.param_groups
        kind, rate = {key: group[key] for key in ("fused", "foreach")}, group["lr"]
        fresh.load_state_dict(state)
        (group,) = fresh.optimizer.param_groups
        assert {key: group[key] for key in kind} == kind
        assert group["lr"] is rate
        for scheduled in (before, fresh):
            scheduled.start_epoch(4)
            weights_of(scheduled).data.fill_(2.0)
            step(scheduled)
        torch.testing.assert_close(weights_of(fresh), weights_of(before))

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_brings_momentum_into_the_layout_of_the_weights(self, layout):
        """Fused kernels would go through both as they lie in memory, and say nothing."""
        results = []
        for target in (torch.contiguous_format, torch.channels_last):
            before, after = (
                made(start=WEIGHTS.contiguous(memory_format=kind), on_gpu=True) for kind in (layout, target)
            )
            step(before)
            after.load_state_dict(before.state_dict())
            step(after)
            assert after.optimizer.state[weights_of(after)]["momentum_buffer"].is_contiguous(memory_format=target)
            results.append(weights_of(after))
        torch.testing.assert_close(*results)


class TestKinds:
    @pytest.mark.parametrize("group", ["student", "agent"])
    def test_are_the_same_for_the_student_and_the_policy(self, group):
        optimizer = {"name": "adamw", "options": {"betas": [0.5, 0.6]}, "weight_decay_agent": 0.3}
        scheduled = made(group, optimizer=optimizer | {"weight_decay_stage2": 0.3})
        (used,) = scheduled.optimizer.param_groups
        assert type(scheduled.optimizer) is torch.optim.AdamW
        assert (*used["betas"], used["weight_decay"]) == (0.5, 0.6, 0.3)

    def test_do_not_change_the_pretraining_of_a_distiller(self):
        assert type(made("pretrain", optimizer={"name": "AdamW"}).optimizer) is torch.optim.SGD

    @pytest.mark.parametrize("name", get_args(Optimizer))
    def test_go_on_from_a_saved_state_as_if_nothing_had_happened(self, name):
        whole, first = made(optimizer={"name": name}), made(optimizer={"name": name})
        step(whole, 4)
        step(first, 2)
        second = made(optimizer={"name": name}, start=weights_of(first).detach())
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        step(second, 2)
        assert torch.equal(weights_of(second), weights_of(whole))
        found, expected = (
            {key: value.dtype for key, value in scheduled.state_dict()["state"][0].items()}
            for scheduled in (second, whole)
        )
        assert found == expected

    @pytest.mark.parametrize(
        ("name", "options", "complaint"),
        [
            ("AdamW", {"beta": [0.9, 0.95]}, "unexpected keyword argument 'beta'"),
            ("AdamW", {"lr": 0.1}, "multiple values for keyword argument 'lr'"),
            ("SGD", {"momentum": 0.5}, "multiple values for keyword argument 'momentum'"),
            ("AdamW", {"betas": [0.9]}, "IndexError"),
            ("AdamW", {"eps": -1}, "Invalid epsilon value: -1"),
        ],
    )
    def test_refuse_wrong_options_in_a_line(self, name, options, complaint):
        with pytest.raises(UserError, match=r"^training\.optimizer\.options: [^\n]*$") as error:
            made(optimizer={"name": name, "options": options})
        assert complaint in str(error.value)

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
    def test_warm_up_rises_linearly_to_the_full_rate_from_which_the_cosine_begins(self, group):
        keys = {"warmup_epochs": 3, "lr": 0.4, "lr_agent": 0.4}
        for kind, later in (({"lr_decay_epochs": [5]}, [0.4, 0.04]), ({"schedule": "cosine", "epochs": 5}, [0.2, 0.0])):
            rates = [0.1, 0.2, 0.3, 0.4, *later]
            assert [made(group, **keys | kind).lr_at(epoch) for epoch in range(6)] == pytest.approx(rates)


def test_clipping_limits_the_norm_of_all_gradients_of_the_student_together():
    scheduled = made("student", clip_grad_norm=0.5, lr=1.0, optimizer={"weight_decay_stage2": 0, "momentum": 0})
    before = weights_of(scheduled).detach().clone()
    step(scheduled)
    assert (weights_of(scheduled) - before).norm().item() == pytest.approx(0.5, rel=1e-4)
    assert made("agent", clip_grad_norm=0.5).clip_norm == 0
