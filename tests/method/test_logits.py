"""What is matched at the logits under any distiller, and the ramp of the first epochs."""

from __future__ import annotations

import math

import pytest
import torch
from documents import execute, shown_file
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_runs import EPOCHS, finish, make_engine, records, toy_config
from toys import NUM_CLASSES, take_step, toy_batch, toy_task

from distillers.logits import LOGIT_LOSSES, LogitLoss
from distillers.registry import build

NAMES = list(dict.fromkeys(["wsld", *LOGIT_LOSSES]))  # and what somebody has added
every_loss = pytest.mark.parametrize("name", NAMES)


def make(name: str, options=None) -> LogitLoss:
    return build(LOGIT_LOSSES, name, "kd_loss.logits_options", options, 4.0)


@pytest.fixture(autouse=True)
def _example(monkeypatch):
    """That of docs/extending.md is one of them, unless somebody has put a file of that name there."""
    monkeypatch.setattr(LOGIT_LOSSES, "_entries", {name: LOGIT_LOSSES.get(name) for name in LOGIT_LOSSES})
    if "wsld" not in LOGIT_LOSSES:
        execute("distillers.wsld", shown_file("distillers/wsld.py"))


def logits_and_gate(seed=0, size=6):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(size, NUM_CLASSES, generator=generator) for _ in range(2))
    return student.requires_grad_(), teacher, torch.randint(2, (size,), generator=generator).float()


class TestEveryLoss:
    @every_loss
    def test_is_that_of_the_chosen_samples_times_their_share_with_the_same_gradient(self, name):
        loss, batch = make(name), toy_batch()
        for seed in range(4):
            student, teacher, gate = (x.detach().double() for x in logits_and_gate(seed))
            student.requires_grad_()
            chosen = gate > 0
            masked = loss(student, teacher, gate, batch)
            (gradient,) = torch.autograd.grad(masked, student)
            rows = student.detach()[chosen].requires_grad_()
            some = batch._replace(label=batch.label[chosen])
            plain = loss(rows, teacher[chosen], torch.ones_like(gate[chosen]), some) * gate.mean()
            torch.testing.assert_close(masked, plain, rtol=1e-9, atol=1e-13)
            torch.testing.assert_close(gradient[chosen], *torch.autograd.grad(plain, rows), rtol=1e-9, atol=1e-13)
            assert not gradient[~chosen].any()

    @every_loss
    def test_costs_nothing_and_moves_nothing_when_no_sample_is_chosen(self, name):
        student, teacher, gate = logits_and_gate()
        loss = make(name)(student, teacher, 0 * gate, toy_batch())
        loss.backward()
        assert loss == 0
        assert not student.grad.any()

    @every_loss
    def test_computes_without_looking_at_a_value(self, name):
        loss = make(name)
        with FakeTensorMode() as mode:
            student, teacher, gate = (mode.from_tensor(x) for x in logits_and_gate())
            batch = toy_batch()._replace(label=mode.from_tensor(toy_batch().label))
            loss(student, teacher, gate, batch).backward()

    @every_loss
    def test_computes_the_same_under_autocast_to_the_last_bit(self, name):
        loss, inputs = make(name), (*logits_and_gate(), toy_batch())
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(*inputs)
        assert torch.equal(found, loss(*inputs))

    @every_loss
    def test_stays_finite_where_networks_are_as_sure_as_they_can_be(self, name):
        for scale in (1e4, 1e30):
            student, teacher, gate = logits_and_gate()
            student = (scale * student).detach().requires_grad_()
            loss = make(name)(student, -scale * teacher, torch.ones_like(gate), toy_batch())
            loss.backward()
            assert loss.isfinite()
            assert student.grad.isfinite().all()


class Learned(LogitLoss):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, student, teacher, gate, batch):
        return (self.scale * (student - teacher).square().mean(dim=1) * gate).mean()


def test_what_a_loss_assigns_to_itself_is_trained_and_saved_with_the_student():
    task = toy_task("at", logit_loss=Learned())
    assert any(parameter is task.logit_loss.scale for parameter in task.parameter_groups()["student"])
    assert "logit_loss.scale" in task.extra_state()
    take_step(task, toy_batch())
    assert task.logit_loss.scale.grad.any()


class TestRamp:
    @pytest.mark.parametrize(
        ("distiller", "options", "alpha", "beta"),
        [
            ("dkd", {}, 20, 0),
            ("reviewkd", {}, 0, 20),
            ("reviewkd", {"logit_loss": "dkd"}, 20, 20),
            ("at", {"logit_loss": "dkd"}, 20, 0),
            ("dkd", {"logit_loss": "kl"}, 0, 0),
            ("at", {"warmup_epochs": 5}, 5, 5),
            ("reviewkd", {"warmup_epochs": 0}, 0, 0),
        ],
    )
    def test_is_as_long_as_the_loss_says_unless_the_user_does(self, distiller, options, alpha, beta):
        if name := options.get("logit_loss"):
            options = options | {"logit_loss": make(name)}
        task = toy_task(distiller, **options)
        assert (task.alpha_epochs, task.beta_epochs) == (alpha, beta)

    def test_grows_from_epoch_to_epoch_and_stays_at_one(self):
        task = toy_task("dkd", warmup_epochs=3)
        part = task.alpha_part
        found = []
        for epoch in (0, 1, 2, 3, 1):
            task.start_epoch(epoch)
            found.append(part.item())
        assert found == pytest.approx([1 / 3, 2 / 3, 1, 1, 2 / 3])
        assert task.alpha_part is part
        assert not any("_part" in name for name in task.extra_state())

    def test_weighs_the_terms_of_a_run_in_every_epoch_and_the_log_has_them_unweighted(self, tmp_path):
        engine = make_engine(tmp_path / "run", "reviewkd", config=toy_config(init_epoch=1))
        beta = engine.task.beta
        finish(engine)
        lines = records(engine.run)
        assert [line["epoch"] for line in lines] == list(range(2, EPOCHS + 1))
        for line in lines:
            parts = line["train"]
            spots = sum(parts[f"loss/{spot}"] for spot in ("f1", "f2", "f3"))
            expected = parts["loss/ce"] + beta * line["epoch"] / 20 * spots + parts["loss/kl"]
            assert math.isclose(parts["loss/total"], expected, rel_tol=1e-5)
