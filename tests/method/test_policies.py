"""A policy of one's own, and what cannot be chosen."""

from __future__ import annotations

import re

import pytest
import torch
from captured_steps import Training, use_optimizers_of_a_gpu
from documents import execute, shown_file
from step_tape import TapeRecorder
from torch import nn
from toy_runs import assert_equal, finish, make_engine, records, toy_config
from toys import IMAGE_SIZE, ToyNet, take_step, toy_batch, toy_labels, toy_task

from distillers.registry import POLICIES, build
from distillers.spot_adaptive.join import join
from distillers.spot_adaptive.policy import Policy
from utils.errors import UserError


@pytest.fixture
def own(monkeypatch):
    """A place in which a test may register policies; those of docs/extending.md are there."""
    monkeypatch.setattr(POLICIES, "_entries", {name: POLICIES.get(name) for name in POLICIES})
    for name in ("unsure", "mlp"):
        if name not in POLICIES:
            execute(f"distillers.{name}", shown_file(f"distillers/{name}.py"))
    return POLICIES


class TestOwnPolicy:
    def test_of_the_documents_is_what_it_says_without_the_routed_pass(self, own):
        batch = toy_batch(40)
        for selection in ("adaptive", "anti", "shuffled"):
            task = toy_task("at", selection=selection, policy=lambda setting: own.get("unsure")(setting, below=0.2))
            output = take_step(task, batch)
            assert not task.routed
            assert not hasattr(task, "router")
            assert list(task.parameter_groups()) == ["student"]
            assert "loss/policy" not in output.parts
            with torch.no_grad():
                unsure = task.teacher(batch.image).softmax(dim=1).gather(1, batch.label[:, None]) < 0.2
            expected = torch.cat([unsure.expand(-1, 2), torch.ones(40, 1)], dim=1)
            assert 0 < unsure.float().mean() < 1
            if selection != "shuffled":
                assert torch.equal(output.gates, expected if selection == "adaptive" else 1 - expected)

    def test_sees_both_networks_the_labels_and_the_epoch_without_gradient_and_in_float32(self):
        seen = []

        class Even(Policy):
            def draw_gates(self, everything):
                assert not torch.is_autocast_enabled("cpu")
                seen.append(everything)
                return (everything.label % 2 == 0)[:, None].expand(-1, self.setting.num_gates)

        task, batch = toy_task("at", policy=Even), toy_batch()
        task.start_epoch(7)
        gates = [take_step(task, batch).gates]
        with torch.autocast("cpu", torch.bfloat16):
            gates.append(take_step(task, batch).gates)
        found, under_autocast = seen
        features, logits = task.teacher.features(batch.image)
        assert_equal(list(found.teacher), features)
        assert torch.equal(found.teacher_logits, logits)
        assert [tuple(x.shape[1:]) for x in found.student] == ToyNet().feature_shapes(*IMAGE_SIZE)
        assert torch.equal(found.label, batch.label)
        assert found.epoch == 7
        assert not any(x.requires_grad for x in (*found.student, found.student_logits))
        vectors = under_autocast.pooled, under_autocast.student_logits, under_autocast.teacher_logits
        assert [x.dtype for x in vectors] == 3 * [torch.float32]
        for drawn in gates:
            torch.testing.assert_close(drawn[:, 0], (batch.label % 2 == 0).float(), rtol=0, atol=0)

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (
                lambda policy, seen, gates: gates[:, 1:],
                r"draw_gates gives \(6, 2\), must be \[B, K \+ 1\], here \(6, 3\)",
            ),
            (lambda policy, seen, gates: gates.tolist(), r"draw_gates gives a list, must be \[B, K \+ 1\]"),
            (lambda policy, seen, gates: gates.detach(), "has parameters, and draw_gates gives gates without gradient"),
            (lambda policy, seen, gates: 2 * gates, r"draw_gates gives 2, must be 0 or 1 each"),
            (lambda policy, seen, gates: seen.label.zero_(), "draw_gates writes into a tensor that it is given"),
            (lambda policy, seen, gates: setattr(policy, "late", nn.Linear(2, 2)), "has made parameters in a step"),
        ],
    )
    def test_that_does_something_else_is_named(self, own, spoil, message):
        class Wrong(own.get("mlp")):
            def draw_gates(self, seen):
                gates = super().draw_gates(seen)
                spoilt = spoil(self, seen, gates)
                return gates if spoilt is None else spoilt

        with pytest.raises(UserError, match=f"policy Wrong: {message}"):
            take_step(toy_task("at", policy=Wrong), toy_batch())

    def test_whose_gates_are_off_by_rounding_or_whose_parameters_are_frozen_is_taken(self):
        class Rounded(Policy):
            def __init__(self, setting):
                super().__init__(setting)
                self.net = nn.Linear(setting.pooled_size, setting.num_gates)

            def draw_gates(self, seen):
                soft = self.net(seen.pooled).sigmoid()
                return (soft > soft.median()).float() + soft - soft.detach()

        batch = toy_batch(40)
        task = toy_task("at", policy=Rounded)
        gates = take_step(task, batch).gates
        assert set(gates.unique().tolist()) == {0.0, 1.0}
        assert task.policy.net.weight.grad.abs().sum() > 0
        task.policy.chances = lambda seen: torch.rand(3)
        features, logits = task.student.features(batch.image)
        with pytest.raises(UserError, match=r"chances gives \(3,\), must be \[B, K \+ 1\]"):
            task.chances(task.policy_input(features, features, logits, logits, batch.label))
        frozen = toy_task("at", policy=lambda setting: Rounded(setting).requires_grad_(False))
        assert not frozen.routed
        assert torch.equal(take_step(frozen, batch).gates, gates)

    def test_whose_gates_go_wrong_in_a_later_epoch_ends_at_that_step(self, tmp_path):
        class Ramp(Policy):
            def draw_gates(self, seen):
                return 0.3 * seen.epoch * torch.ones(len(seen.label), self.setting.num_gates)

        engine = make_engine(tmp_path, "at", policy=Ramp, config=toy_config())
        with pytest.raises(UserError, match=r"at train epoch 2 step 1: gate/f1 nan, .*policy must give 0 or 1"):
            finish(engine)

    def test_resumes_and_is_captured(self, own, tmp_path, monkeypatch):
        learned = own.get("mlp")
        engine = make_engine(tmp_path, "at", selection="shuffled", policy=learned, config=toy_config())
        finish(engine)
        resumed = make_engine(
            tmp_path, "at", selection="shuffled", policy=learned, config=toy_config(epochs=4), resume=True
        )
        assert_equal(resumed.task.extra_state(), engine.task.extra_state())
        finish(resumed)
        assert "loss/policy" in records(resumed.run)[-1]["train"]
        use_optimizers_of_a_gpu(monkeypatch)
        states = []
        for recorder in (None, TapeRecorder()):
            training = Training("at", recorder, selection="shuffled", policy=learned).take([8, 8, 5, 8, 5])
            assert not training.complaints
            states.append(training.state())
        assert_equal(*states)

    def test_its_options_are_checked_where_another_type_is_known_to_type_checkers_alone(self, own):
        @own.register("needy")
        class Needy(Policy):
            def __init__(self, setting: "Missing", size: "Missing", *, below: "float" = 0.5):  # noqa: F821, UP037
                super().__init__(setting)

        for options, message in (({}, "needy needs size"), ({"below": "abc"}, r"needy\.below is 'abc': Input ")):
            with pytest.raises(UserError, match=rf"^kd\.policy_options: {message}"):
                build(POLICIES, "needy", "kd.policy_options", options, None)


def given(key: str, name: str, **options) -> dict:
    """Arguments of `join` that choose something by its name."""
    return {key: name, {"distiller": "options"}.get(key, f"{key}_options"): options}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"selection": "fixd"}, "selection is 'fixd', expected one of fixed, random, anti"),
        ({"temperature": 0}, "temperature is 0, expected a number above 0"),
        ({"gate_temperature": float("nan")}, "gate_temperature is nan, expected a number above 0"),
        ({"balance": -1}, "balance is -1, expected a number above 0"),
        ({"gamma": 0}, "gamma is 0, expected a number above 0"),
        ({"beta": float("nan")}, "beta is nan, expected a number from 0 on"),
        ({"alpha": -1}, "alpha is -1, expected a number from 0 on"),
        ({"student": ToyNet(num_classes=3)}, "student and teacher give 3 and 5 logits, expected the same"),
        ({"teacher": torch.nn.Linear(3, 5)}, "teacher: running it on images of 8x8 in evaluation mode failed: "),
        ({"standardize": True}, "kd_loss.standardize: with two classes, "),
        (given("distiller", "crd", negatives=0), "kd_loss.options: crd.negatives is 0: Input should be greater than 0"),
        (given("distiller", "crd", momentum=1.0), "kd_loss.options: crd.momentum is 1.0: Input should be less than 1"),
        (
            given("distiller", "crd", width=3),
            "kd_loss.options: crd has no option 'width'; it has negatives, temperature, momentum",
        ),
        (given("logits", "dkd", nontarget=-1), "kd_loss.logits_options: dkd.nontarget is -1: Input should be greater"),
        (given("logits", "kl", temperature=1), "kd_loss.logits_options: kl has no option 'temperature'; it has none"),
        (given("logits", "dkdd"), "unknown loss at the logits 'dkdd': did you mean 'dkd'"),
        (given("policy", "gumbl"), "unknown policy 'gumbl': did you mean 'gumbel'"),
        (given("policy", "gumbel", above=1), "kd.policy_options: gumbel has no option 'above'; it has none"),
    ],
)
def test_join_refuses_what_cannot_be_in_one_line(changes, message):
    setting = {"distiller": "at", "labels": toy_labels() % 2, "image_size": IMAGE_SIZE} | changes
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        join(**{"student": ToyNet(), "teacher": ToyNet()} | setting)


def test_a_student_may_be_its_own_teacher_as_it_is_now():
    network = ToyNet()
    task = join(network, network, "at", labels=toy_labels().tolist(), image_size=IMAGE_SIZE).train()
    take_step(task, toy_batch())
    assert all(p.grad is not None for p in network.parameters())
    assert task.teacher is not network
    assert torch.equal(task.teacher.fc.weight, network.fc.weight)
    assert not task.teacher.fc.weight.requires_grad


def test_a_step_puts_both_networks_into_their_modes_whatever_holds_them():
    student, teacher = ToyNet(), ToyNet()
    task = join(student, teacher, "at", labels=toy_labels(), image_size=IMAGE_SIZE)
    torch.nn.ModuleList([task, teacher]).train()
    student.eval()
    before = teacher.bn1.running_mean.clone()
    take_step(task, toy_batch())
    assert (student.training, teacher.training) == (True, False)
    assert torch.equal(teacher.bn1.running_mean, before)
