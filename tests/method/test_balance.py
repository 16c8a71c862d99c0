"""Balanced spots: the gradients of whole steps are in test_fast_path; here is how one feature is balanced."""

from __future__ import annotations

import pytest
import torch
from captured_steps import Training
from odd_networks import Transformer
from process_pair import process_pair
from torch import nn
from toys import NUM_CLASSES, take_step, toy_batch, toy_labels, toy_task

from distillers.spot_adaptive.balance import Balance, excessive_beta
from distillers.spot_adaptive.join import join
from models import StagedModel
from utils.processes.group import rank


class Line(StagedModel):
    """Two features, each of which is the input times a weight of 1."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.ones(()) for _ in range(3))

    def stages(self):
        return [[lambda x, weight=weight: weight * x] for weight in self.weights]


def pulled(behind: float, by_spots: tuple[float, ...], cap: float = 1.0) -> tuple[Balance, torch.Tensor]:
    """After a backward pass in which the logits send `behind` and the distiller sends each of `by_spots`; and the
    gradient at the image."""
    balance, image = Balance(cap, 2), torch.ones(1, requires_grad=True)
    _, views, logits = balance.features(Line(), image)
    (behind * logits + sum(pull * view for pull, view in zip(by_spots, views))).sum().backward()
    return balance, image.grad


def test_a_pull_is_limited_by_all_that_lies_behind_the_feature():
    balance, gradient = pulled(2.0, (10.0, 6.0))
    assert balance.ratio.tolist() == pytest.approx([10 / (2 + 2), 6 / 2])
    assert balance.weight.tolist() == pytest.approx([4 / 10, 2 / 6])
    assert gradient.item() == pytest.approx(2 + 2 + 4)


def test_a_pull_below_the_cap_stays_as_it_is_and_is_never_made_larger():
    balance, gradient = pulled(2.0, (0.5, -0.5), cap=0.5)
    assert balance.weight.tolist() == [1.0, 1.0]
    assert gradient.item() == 2.0


def test_where_nothing_lies_behind_or_no_sample_is_chosen_the_weight_is_one():
    for behind, spots in ((0.0, (3.0, 0.0)), (2.0, (0.0, 0.0))):
        balance, gradient = pulled(behind, spots)
        assert (balance.ratio.tolist(), balance.weight.tolist()) == ([0.0, 0.0], [1.0, 1.0])
        assert gradient.item() == behind + sum(spots)


def test_what_a_step_sends_nothing_to_keeps_nothing_of_the_step_before():
    balance, _ = pulled(2.0, (10.0, 6.0))
    _, _, logits = balance.features(Line(), torch.ones(1, requires_grad=True))
    logits.sum().backward()
    assert (balance.ratio.tolist(), balance.weight.tolist()) == ([0.0, 0.0], [1.0, 1.0])


def joint_pull(first: tuple[float, ...], second: tuple[float, ...]) -> tuple[float, float]:
    """On one of two processes: logits pull with 3 and 4, the spots with `first` and `second`."""
    balance, gradient = pulled((3.0, 4.0)[rank()], (first, second)[rank()], cap=2.0)
    return balance.ratio[1].item(), gradient.item()


def test_the_norms_are_those_of_the_whole_batch_on_several_processes():
    with process_pair() as on_both:
        for spots in (((0.0, 40.0), (0.0, 30.0)), ((0.0, 50.0), ())):  # also where one process sends nothing
            first, second = on_both(joint_pull, *spots)
            assert first == pytest.approx((10.0, 3 + 0.2 * sum(spots[0])))
            assert second == pytest.approx((10.0, 4 + 0.2 * sum(spots[1])))


def test_a_step_leaves_nothing_to_the_next_and_balances_nothing_without_spots():
    training = Training("at", balance=0.01, beta=1000.0).take([6])
    assert 0 < training.meter.means()["weight/f2"] < 1
    assert training.meter.means()["ratio/f2"] > 0.01
    assert not [name for name in training.task.extra_state() if "balance" in name]
    assert toy_task("kd", balance=1.0).balance is None


def test_a_spot_whose_weight_is_below_a_tenth_is_named_with_how_much_is_too_much():
    means = {"weight/f1": 1.0, "weight/f2": 0.1, "weight/f3": 0.08, "ratio/f3": 12.5, "loss/f3": 0.01}
    assert excessive_beta(means, 1000.0) == ["kd.balance: β 1000 is 12 times too much at f3 (its weight is 0.080)"]


def test_maps_made_of_tokens_are_balanced_as_well():
    how = {"labels": toy_labels(), "image_size": (32, 32), "selection": "fixed", "beta": 1e6, "balance": 1.0}
    task = join(Transformer(NUM_CLASSES), Transformer(NUM_CLASSES), "at", spots=[(0, 0)], **how).train()
    batch = toy_batch()._replace(image=torch.randn(6, 3, 32, 32))
    found, views, logits = task.balance.features(task.student, batch.image)
    features, expected = task.student.features(batch.image)
    torch.testing.assert_close([*found, logits], [*features, expected])
    torch.testing.assert_close(views, features)
    take_step(task, batch)
    assert task.balance.ratio[0] > 1
