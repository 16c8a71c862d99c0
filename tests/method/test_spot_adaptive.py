"""The policy, its gates, the routed pass and the two losses."""

import pytest
import torch
from toys import take_step, toy_batch, toy_task

from distillers.base import Spot
from distillers.spot_adaptive.distillation import routing_loss
from distillers.spot_adaptive.policy import Gumbel, PolicySetting, Seen
from distillers.spot_adaptive.routing import mix
from distillers.spot_adaptive.selection import SELECTIONS


class TestGates:
    def test_start_open_for_a_homogeneous_pair(self):
        spots = [Spot(1, 1), Spot(2, 2)]
        policy = Gumbel(PolicySetting([(8,)], [(6,)], spots, homogeneous=True))
        seen = Seen([torch.randn(1000, 8)], [torch.randn(1000, 6)], *4 * [None])
        gates = policy.draw_gates(seen)
        assert gates.shape == (1000, 3)
        assert gates.mean() > 0.995

    def test_random_selection_is_a_fair_coin_per_gate(self):
        gates = SELECTIONS["random"].choose(torch.ones(20_000, 4))
        assert gates.mean(dim=0).sub(0.5).abs().max() < 0.02
        correlation = torch.corrcoef(gates.T) - torch.eye(gates.shape[1])
        assert correlation.abs().max() < 0.03


def test_a_sample_changes_sides_exactly():
    student, teacher = torch.randn(2, 6, 4, 3, 3)
    assert torch.equal(mix(student, teacher, torch.ones(6)), teacher)
    assert torch.equal(mix(student, teacher, torch.zeros(6)), student)


def test_a_routed_loss_that_equals_the_students_weighs_one():
    routed = torch.tensor(3.0)
    assert routing_loss(routed, routed, torch.ones(4), gamma=2.0) == 3


def test_a_missing_sample_costs_one_per_process():
    """Gradients are averaged over processes, and this is a sum over the whole batch."""
    routed, gates = torch.tensor(3.0), torch.zeros(4, requires_grad=True)
    routing_loss(routed, routed, gates, gamma=2.0, processes=3).backward()
    assert gates.grad.tolist() == 4 * [-3]


class TestTwin:
    def test_is_no_part_of_the_checkpoint(self):
        task = toy_task("at")
        assert not any("twin" in key for key in task.state_dict())
        assert {key.split(".")[0] for key in task.extra_state()} == {"policy", "router"}


def test_the_students_activations_make_room_for_the_routed_pass(monkeypatch):
    class Kept:
        """Stands for a tensor that a graph remembers."""

        count = 0

        def __init__(self, tensor):
            self.tensor = tensor
            Kept.count += 1

        def __del__(self):
            Kept.count -= 1

    task, at_routing = toy_task("at"), []
    route = task.router.forward
    monkeypatch.setattr(task.router, "forward", lambda *args: (at_routing.append(Kept.count), route(*args))[1])
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        take_step(task, toy_batch())
    # What is left is the policy's own: a handful, where the student alone remembers dozens.
    assert 0 < at_routing[0] <= 8


class TestRoutingShare:
    @pytest.mark.parametrize(
        ("share", "size", "routed"),
        [(1, 6, 6), (0.5, 6, 3), (0.5, 7, 4), (0.1, 30, 3), (0.01, 6, 2)],
    )
    def test_is_rounded_up_to_whole_samples_and_at_least_two(self, share, size, routed):
        task, seen = toy_task("at", routing_share=share), []
        task.router.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        take_step(task, toy_batch(size))
        assert seen == [routed]
