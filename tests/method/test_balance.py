"""Balanced spots: the weights of single steps are in test_fast_path; here is what lies between the steps."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from captured_steps import Training, use_optimizers_of_a_gpu
from made_up_runs import BETA, write_run
from odd_networks import Transformer
from process_pair import process_pair
from step_tape import TapeRecorder
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_runs import PowerCut, assert_equal, cut_power_after, finish, make_engine, records, toy_config
from toys import NUM_CLASSES, take_step, toy_batch, toy_labels, toy_task

from distillers.spot_adaptive.balance import (
    MEASURE_EVERY,
    MOMENTUM,
    UNSET,
    Balance,
    excessive_beta,
    features_on_the_way,
)
from distillers.spot_adaptive.join import join
from distillers.spot_adaptive.selection import SELECTIONS
from utils.processes.group import rank
from utils.report.curves import contributions
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.read import read_run


def measure(balance: Balance, of_spots, of_labels=(3.0, 3.0), chosen=((1.0, 1.0),), beta: float = 2.0) -> list[float]:
    """Ratios after a measurement in which gradients have these norms."""
    features = [torch.ones(1, 1, requires_grad=True) for _ in of_spots]
    ce = sum(norm * feature.sum() for norm, feature in zip(of_labels, features))
    losses = torch.stack([norm * feature.sum() for norm, feature in zip(of_spots, features)])
    balance.measure(ce, losses, list(zip(features, features)), torch.tensor(chosen), beta)
    return balance.ratio.tolist()


class TestRatios:
    def test_are_those_of_the_first_measurement_and_then_smoothed(self):
        balance = Balance(1.0, 2)
        assert balance.ratio.tolist() == [UNSET, UNSET]
        assert measure(balance, (3.0, 12.0)) == pytest.approx([2.0, 8.0])
        expected = [MOMENTUM * 2.0 + (1 - MOMENTUM) * 4.0, MOMENTUM * 8.0 + (1 - MOMENTUM) * 2.0]
        assert measure(balance, (6.0, 3.0)) == pytest.approx(expected)

    def test_stay_where_no_sample_is_chosen_or_the_labels_have_no_gradient(self):
        balance = Balance(1.0, 2)
        measure(balance, (3.0, 12.0))
        assert measure(balance, (6.0, 0.0), chosen=((0.0, 0.0),)) == pytest.approx([2.0, 8.0])
        assert measure(balance, (6.0, 3.0), of_labels=(0.0, 3.0))[0] == pytest.approx(2.0)

    def test_of_a_frozen_feature_or_a_loss_without_gradient_are_none(self):
        balance, frozen = Balance(1.0, 1), torch.ones(1, 1)
        trained = torch.ones(1, 1, requires_grad=True)
        for ce, loss in ((trained.sum(), trained.sum()), (frozen.sum(), frozen.sum())):
            balance.measure(ce, loss[None], [(frozen, frozen)], torch.ones(1, 1), 1.0)
            assert balance.ratio.tolist() == [UNSET]

    def test_become_weights_that_cap_the_pull_and_never_add_to_it(self):
        weights = Balance(0.5, 4)(torch.tensor([UNSET, 0.1, 0.5, 5.0]))
        assert weights.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.1])


def joint_ratio() -> list[float]:
    """On one of two processes, where labels pull with 3 and 4, and a spot with 6 and 8."""
    own = rank()
    return measure(Balance(1.0, 1), ((6.0, 8.0)[own],), ((3.0, 4.0)[own],), [[(1.0, 0.0)[own]]], beta=7.0)


def test_the_ratio_is_that_of_the_whole_batch_on_several_processes():
    with process_pair() as on_both:
        assert on_both(joint_ratio) == [pytest.approx([14.0])] * 2


def test_a_measurement_looks_at_no_value():
    with FakeTensorMode():
        balance, feature, chosen = Balance(1.0, 1), torch.ones(2, 3, requires_grad=True), torch.ones(2, 1)
        balance.measure(feature.sum(), feature.square().sum()[None], [(feature, feature)], chosen, 2.0)
        balance(balance.ratio)
        SELECTIONS["shuffled"].choose(chosen)


class TestSteps:
    def test_measure_at_every_nth_step_and_keep_the_ratio_between(self):
        task, ratios = toy_task("at", selection="fixed", balance=1.0, beta=1000.0), []
        for step in range(MEASURE_EVERY + 2):
            task.start_step(step)
            take_step(task, toy_batch(seed=step))
            ratios.append(task.balance.ratio.clone())
        changes = [not torch.equal(before, after) for before, after in itertools.pairwise(ratios)]
        assert changes == [False] * (MEASURE_EVERY - 1) + [True, False]
        assert (ratios[0] > 0).all()

    def test_change_no_bit_of_the_student_where_the_cap_is_out_of_reach(self):
        gradients = []
        for balance in (None, 1e30):
            task = toy_task("vid", balance=balance)
            take_step(task, toy_batch())
            gradients.append({name: p.grad for name, p in task.named_parameters() if p.grad is not None})
        assert gradients[0].keys() == gradients[1].keys()
        assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])

    def test_measure_nothing_in_evaluation_and_nothing_without_spots(self):
        task = toy_task("at", balance=1.0)
        take_step(task.eval(), toy_batch())
        assert task.balance.ratio.tolist() == [UNSET, UNSET]
        assert toy_task("kd", balance=1.0).balance is None


def test_a_spot_whose_weight_is_below_a_tenth_is_named_with_how_much_is_too_much():
    means = {"weight/f1": 1.0, "weight/f2": 0.1, "weight/f3": 0.08, "ratio/f3": 12.5, "loss/f3": 0.01}
    assert excessive_beta(means, 1000.0) == ["kd.balance: β 1000 is 12 times too much at f3 (its weight is 0.080)"]


def test_maps_made_of_tokens_are_balanced_as_well():
    how = {"labels": toy_labels(), "image_size": (32, 32), "selection": "fixed", "beta": 1e6, "balance": 1.0}
    task = join(Transformer(NUM_CLASSES), Transformer(NUM_CLASSES), "at", spots=[(0, 0)], **how).train()
    batch = toy_batch()._replace(image=torch.randn(6, 3, 32, 32))
    found, logits = features_on_the_way(task.student, batch.image, task.num_features)
    features, expected = task.student.features(batch.image)
    torch.testing.assert_close([*found, logits], [*features, expected])
    take_step(task, batch)
    assert task.balance.ratio > 0


def test_captured_steps_measure_when_eager_ones_do_and_do_the_same(monkeypatch):
    use_optimizers_of_a_gpu(monkeypatch)
    monkeypatch.setattr("distillers.spot_adaptive.balance.MEASURE_EVERY", 3)
    states = []
    for recorder in (None, TapeRecorder()):
        training = Training("at", recorder, balance=0.01, beta=100.0)
        training.take([8] * 8 + [5, 8, 5, 8, 5, 8])
        assert not training.complaints
        states.append(training.state())
    assert_equal(*states)
    assert len(training.step._by_kind) == 4  # two sizes, with and without a measurement


def balanced_engine(folder, resume=False):
    """An engine under which the cap is reached; the measurements lie in the middle of epochs."""
    return make_engine(folder, "at", resume=resume, config=toy_config(save_every_steps=2), balance=0.001)


def test_a_run_that_is_cut_off_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr("distillers.spot_adaptive.balance.MEASURE_EVERY", 3)
    whole = balanced_engine(tmp_path / "whole")
    finish(whole)
    cut = balanced_engine(tmp_path / "cut")
    cut_power_after(cut, 3)
    with pytest.raises(PowerCut):
        finish(cut)
    torch.manual_seed(99)
    finish(balanced_engine(tmp_path / "cut", resume=True))
    found, expected = (read_checkpoint(engine.run.last) for engine in (cut, whole))
    assert expected["extra"]["balance.ratio"].gt(0).all()
    assert_equal(found, expected)
    assert records(cut.run) == records(whole.run)
    means = records(whole.run)[-1]["train"]
    assert 0 < means["weight/f2"] < 1
    assert means["ratio/f2"] > 0.001


def test_the_report_knows_the_weight_of_a_balanced_spot(tmp_path):
    folder = write_run(tmp_path, selection="adaptive", settings={"kd": {"balance": 0.5}})
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["train"]["weight/f1"] = 0.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    losses = BETA * run.curve("train.loss/f1")
    assert contributions(run)["loss/f1"].to_list() == pytest.approx((0.25 * losses).to_list())
