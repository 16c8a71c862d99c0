"""The policy, its gates, the routed pass and the two losses."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from toys import ToyNet, take_step, toy_batch, toy_task

from datasets.batch import Batch
from distillers.base import Spot
from distillers.spot_adaptive.distillation import routing_loss
from distillers.spot_adaptive.frozen import frozen_twin
from distillers.spot_adaptive.join import make_logit_loss
from distillers.spot_adaptive.policy import Gumbel, PolicySetting, straight_through_gates
from distillers.spot_adaptive.routing import Router, mix
from distillers.spot_adaptive.selection import SELECTIONS, Seen
from utils.errors import UserError


def gradients(module):
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def route(task, batch, gates):
    with torch.no_grad():
        features, logits = task.teacher.features(batch.image)
    start = task.router.start(features, logits)
    return task.router(batch.image, task._twin[0], task.teacher, start, gates), logits


def test_an_unknown_selection_is_refused():
    with pytest.raises(UserError, match="selection is 'fixd', expected one of fixed, random, anti"):
        toy_task("at", selection="fixd")


@pytest.mark.parametrize("temperature", [0, -4.0, float("nan"), "4"])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(UserError, match=r"kd_loss\.KD_T: temperature is .*, expected a number above 0"):
        make_logit_loss("dkd", temperature, {})
    with pytest.raises(UserError, match=r"kd: gate_temperature is .*, expected a number above 0"):
        Gumbel(PolicySetting([(8,)], [(6,)], [], gate_temperature=temperature))


class TestGates:
    def test_are_exactly_zero_or_one(self):
        gates = straight_through_gates(torch.randn(500, 4, 2), temperature=5.0)
        assert set(gates.unique().tolist()) == {0.0, 1.0}

    def test_follow_the_softmax_of_the_logits(self):
        # Whatever the temperature, the larger of logit plus Gumbel noise wins with the softmax's probability.
        logits = torch.tensor([math.log(0.8), math.log(0.2)]).expand(20_000, 1, 2)
        share = straight_through_gates(logits, temperature=5.0).mean().item()
        assert share == pytest.approx(0.8, abs=0.01)

    def test_pass_back_the_gradient_of_the_soft_choice(self):
        logits = torch.randn(7, 3, 2, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(1)
        noise = -torch.empty_like(logits).exponential_().log()
        weights = torch.randn(7, 3, dtype=torch.float64)
        soft = F.softmax((logits + noise) / 5.0, dim=-1)[..., 0]
        (expected,) = torch.autograd.grad((soft * weights).sum(), logits)
        torch.manual_seed(1)
        (found,) = torch.autograd.grad((straight_through_gates(logits, 5.0) * weights).sum(), logits)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)

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

    def test_fixed_selection_opens_every_gate(self):
        assert torch.equal(take_step(toy_task("at", selection="fixed"), toy_batch()).gates, torch.ones(6, 3))


class TestRouting:
    @pytest.mark.parametrize("distiller", ["kd", "at", "fitnet", "sp", "rkd"])
    def test_with_every_gate_open_gives_the_teachers_logits(self, distiller):
        task, batch = toy_task(distiller), toy_batch()
        routed, logits = route(task, batch, torch.ones(6, task.num_gates))
        assert torch.equal(routed, logits)

    @pytest.mark.parametrize("distiller", ["kd", "at", "fitnet", "sp", "rkd"])
    def test_with_every_gate_closed_gives_the_evaluated_students_logits(self, distiller):
        task, batch = toy_task(distiller), toy_batch()
        routed, _ = route(task, batch, torch.zeros(6, task.num_gates))
        expected = copy.deepcopy(task.student).eval()(batch.image)
        assert torch.equal(routed, expected)

    def test_sends_each_sample_its_own_way(self):
        """One spot in the middle: a sample with gates (1, 0) goes teacher -> adapter -> student."""
        task, batch = toy_task("fitnet", spots=[(1, 1)]), toy_batch()
        task.router.eval()  # adapters with running statistics, so that samples do not see one another
        gates = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 0], [0, 1]]).float()
        routed, logits = route(task, batch, gates)
        student, teacher = copy.deepcopy(task.student).eval(), task.teacher
        h, g = task.router.to_teacher[0], task.router.to_student[0]
        ways = {
            (0, 0): student(batch.image),
            (0, 1): teacher.run(h(student.run(batch.image, stop=2)), 2),
            (1, 0): student.run(g(teacher.run(batch.image, stop=2)), 2),
            (1, 1): logits,
        }
        expected = torch.stack([ways[tuple(gate.int().tolist())][i] for i, gate in enumerate(gates)])
        torch.testing.assert_close(routed, expected, rtol=1e-5, atol=1e-6)

    def test_joins_networks_of_unequal_depth_and_size(self):
        class Deeper(ToyNet):
            def stages(self):
                stem, *rest = super().stages()
                return (stem[:2], stem[2:], *rest)

        student, teacher = ToyNet(width=3), Deeper(width=5)
        shapes = student.feature_shapes(8, 8), teacher.feature_shapes(8, 8)
        router = Router([Spot(0, 1), Spot(2, 3)], *shapes)
        image = torch.randn(4, 3, 8, 8)
        features, logits = teacher.eval().features(image)
        routed = router(image, frozen_twin(student), teacher, router.start(features, logits), torch.ones(4, 3))
        assert torch.equal(routed, logits)

    def test_mix_is_exact_at_both_ends_and_linear_between(self):
        a, b = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
        mixed = mix(a, b, torch.tensor([0.0, 1.0, 0.25]))
        assert torch.equal(mixed[0], a[0])
        assert torch.equal(mixed[1], b[1])
        torch.testing.assert_close(mixed[2], 0.75 * a[2] + 0.25 * b[2])


class TestGradients:
    @pytest.mark.parametrize("distiller", ["kd", "at", "fitnet", "sp", "rkd"])
    def test_the_routing_loss_moves_the_policy_and_the_adapters_alone(self, distiller):
        task, batch = toy_task(distiller), toy_batch()
        with torch.no_grad():
            features, logits = task.teacher.features(batch.image)
        student = task.student.features(batch.image)
        gates = task.draw_gates(task.see(student[0], features, student[1], logits, batch.label))
        start = task.router.start(features, logits)
        routed = task.router(batch.image, task._twin[0], task.teacher, start, gates)
        routing_loss(F.cross_entropy(routed, batch.label), torch.tensor(1.0), gates[:, -1], 1.0).backward()
        assert gradients(task.policy).keys() == dict(task.policy.named_parameters()).keys()
        assert gradients(task.router).keys() == dict(task.router.named_parameters()).keys()
        assert all(gradient.abs().sum() > 0 for gradient in gradients(task.policy).values())
        for frozen in (task.student, task.teacher, task._twin[0], task.distiller):
            assert not gradients(frozen)

    @pytest.mark.parametrize("selection", ["adaptive", "anti"])
    @pytest.mark.parametrize("distiller", ["kd", "at", "fitnet", "sp", "rkd"])
    def test_the_students_gradient_is_that_of_its_own_loss(self, distiller, selection):
        """With and without routing, for the same gates, the gradients agree bit for bit."""
        task, batch = toy_task(distiller, selection=selection), toy_batch()
        plain = copy.deepcopy(task)
        gates = torch.randint(2, (6, task.num_gates)).float().requires_grad_()
        task.draw_gates = lambda *_: gates
        take_step(task, batch)
        plain.routed = False
        plain.draw_gates = lambda *_: gates
        take_step(plain, batch)
        assert gradients(plain.student)
        for part in ("student", "distiller"):
            found, expected = gradients(getattr(task, part)), gradients(getattr(plain, part))
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_the_policy_hears_nothing_of_the_students_loss(self):
        task = toy_task("at")
        student = next(task(toy_batch()))
        assert not student.gates.requires_grad
        student.loss.backward()
        assert gradients(task.student)
        assert not gradients(task.policy)
        assert not gradients(task.router)

    def test_parameter_groups_are_disjoint_and_complete(self):
        task = toy_task("fitnet")
        groups = task.parameter_groups()
        listed = [id(parameter) for group in groups.values() for parameter in group]
        trained = {id(parameter) for parameter in task.parameters() if parameter.requires_grad}
        assert len(listed) == len(set(listed))
        assert set(listed) == trained


class TestRoutingLoss:
    GATE = torch.tensor([1.0, 1.0, 0.0, 1.0])

    def test_weighs_a_worse_routed_pass_by_gamma(self):
        assert routing_loss(torch.tensor(3.0), torch.tensor(2.0), self.GATE, gamma=2.0).item() == 6.0

    def test_weighs_a_better_routed_pass_by_one_over_gamma(self):
        assert routing_loss(torch.tensor(1.0), torch.tensor(2.0), self.GATE, gamma=2.0).item() == 0.5

    def test_leaves_an_equal_routed_pass_alone(self):
        assert routing_loss(torch.tensor(2.0), torch.tensor(2.0), self.GATE, gamma=2.0).item() == 2.0

    def test_charges_one_for_each_sample_missing_from_half_the_batch(self):
        gate = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0, 0.0])
        assert routing_loss(torch.tensor(2.0), torch.tensor(2.0), gate, gamma=1.0).item() == 2.0 + 2.0

    def test_charges_nothing_from_half_the_batch_upwards(self):
        gate = torch.tensor([1.0, 1.0, 0.0, 0.0])
        assert routing_loss(torch.tensor(2.0), torch.tensor(2.0), gate, gamma=1.0).item() == 2.0

    def test_charges_half_samples_of_an_odd_batch(self):
        gate = torch.tensor([1.0, 0.0, 0.0])
        assert routing_loss(torch.tensor(2.0), torch.tensor(2.0), gate, gamma=1.0).item() == 2.5

    def test_lets_no_gradient_into_the_comparison(self):
        routed = torch.tensor(3.0, requires_grad=True)
        routing_loss(routed, torch.tensor(2.0), self.GATE, gamma=2.0).backward()
        assert routed.grad.item() == 2.0


class TestStudentLoss:
    def test_adds_up_from_its_parts(self):
        task = toy_task("at", selection="fixed", alpha=0.5, beta=7.0)
        output = take_step(task, toy_batch())
        parts = output.parts
        expected = parts["loss/ce"] + 7.0 * (parts["loss/f1"] + parts["loss/f2"]) + 0.5 * parts["loss/kl"]
        torch.testing.assert_close(output.loss, expected)
        torch.testing.assert_close(output.loss, parts["loss/total"])

    def test_anti_distils_exactly_where_adaptive_does_not(self):
        batch = toy_batch()
        outputs = {}
        for selection in ("adaptive", "anti"):
            task = toy_task("at", selection=selection)
            torch.manual_seed(3)
            outputs[selection] = take_step(task, batch).parts
        for label in ("f1", "f2", "logits"):
            shares = [outputs[selection][f"gate/{label}"].item() for selection in ("adaptive", "anti")]
            assert sum(shares) == pytest.approx(1.0)
        # The policy itself learns in the same way.
        assert outputs["adaptive"]["loss/routed_ce"] == outputs["anti"]["loss/routed_ce"]
        assert outputs["adaptive"]["loss/policy"] == outputs["anti"]["loss/policy"]

    @pytest.mark.parametrize("selection", SELECTIONS)
    def test_has_the_same_parts_at_every_step(self, selection):
        task = toy_task("sp", selection=selection)
        names = [list(take_step(task, toy_batch(seed=seed)).parts) for seed in range(3)]
        assert names[0] == names[1] == names[2]
        assert ("loss/policy" in names[0]) == SELECTIONS[selection].policy


class TestFrozenParts:
    def test_the_teacher_stays_in_evaluation_mode_and_untouched(self):
        task, batch = toy_task("at"), toy_batch()
        before = copy.deepcopy(task.teacher.state_dict())
        optimizers = [torch.optim.SGD(group, lr=0.1) for group in task.parameter_groups().values()]
        for seed in range(3):
            task.train()
            take_step(task, toy_batch(seed=seed))
            for optimizer in optimizers:
                optimizer.step()
        assert not any(module.training for module in task.teacher.modules())
        after = task.teacher.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert batch.image.grad is None

    def test_the_routed_pass_leaves_the_students_running_statistics_alone(self):
        batch = toy_batch()
        with_routing, without = toy_task("at"), toy_task("at", selection="fixed")
        take_step(with_routing, batch)
        take_step(without, batch)
        for name, buffer in without.student.named_buffers():
            assert torch.equal(buffer, dict(with_routing.student.named_buffers())[name])

    def test_the_twin_follows_the_student(self):
        task = toy_task("at")
        optimizer = torch.optim.SGD(task.student.parameters(), lr=0.5)
        take_step(task, toy_batch())
        optimizer.step()
        image = toy_batch(seed=9).image
        assert torch.equal(task._twin[0](image), copy.deepcopy(task.student).eval()(image))

    def test_the_twin_follows_a_move_to_other_storage(self):
        task = toy_task("at").double()
        pairs = zip(task._twin[0].parameters(), task.student.parameters())
        assert all(a.data_ptr() == b.data_ptr() and a.dtype == torch.float64 for a, b in pairs)

    def test_the_twin_is_no_part_of_the_checkpoint(self):
        task = toy_task("at")
        assert not any("twin" in key for key in task.state_dict())
        assert {key.split(".")[0] for key in task.extra_state()} == {"policy", "router"}


def test_the_students_activations_make_room_for_the_routed_pass(monkeypatch):
    task, batch = toy_task("at"), toy_batch()
    kept, at_routing = [], []

    def pack(tensor):
        kept.append(None)
        return Token(tensor, kept)

    class Token:
        """Stands for a tensor that a graph remembers."""

        def __init__(self, tensor, count):
            self.tensor, self.count = tensor, count

        def __del__(self):
            self.count.pop()

    route = task.router.forward
    monkeypatch.setattr(task.router, "forward", lambda *args: (at_routing.append(len(kept)), route(*args))[1])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda token: token.tensor):
        take_step(task, batch)
    # What is left is the policy's own: a handful, where the student alone remembers dozens.
    assert 0 < at_routing[0] <= 8


class TestRoutingShare:
    @staticmethod
    def policy_gradients(task, batch):
        *_, routing = task(batch)
        routing.loss.backward()
        return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}

    @pytest.mark.parametrize(
        ("share", "size", "routed"),
        [(1, 6, 6), (0.5, 6, 3), (0.5, 7, 4), (0.25, 40, 10), (0.1, 30, 3), (0.01, 6, 2), (0.3, 10, 3)],
    )
    def test_is_rounded_up_to_whole_samples_and_at_least_two(self, share, size, routed):
        task, seen = toy_task("at", routing_share=share), []
        task.router.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        take_step(task, toy_batch(size))
        assert seen == [routed]

    @pytest.mark.parametrize("selection", ["adaptive", "anti"])
    def test_leaves_the_student_its_gradient_bit_for_bit(self, selection):
        results = []
        for share in (1, 0.5):
            task = toy_task("at", selection=selection, routing_share=share)
            torch.manual_seed(3)
            output = take_step(task, toy_batch(8))
            results.append((gradients(task.student), gradients(task.policy), output.parts["loss/total"]))
        (whole, whole_policy, whole_loss), (part, part_policy, part_loss) = results
        assert part_loss == whole_loss
        assert all(torch.equal(part[name], whole[name]) for name in whole)
        assert not torch.equal(part_policy["linear.weight"], whole_policy["linear.weight"])

    def test_compares_both_cross_entropies_on_the_routed_samples(self):
        task, batch = toy_task("at", routing_share=0.5, gamma=3.0, selection="anti"), toy_batch(8)
        student, routing = task(batch)
        ce = F.cross_entropy(student.logits[:4], batch.label[:4])
        routed_ce = routing.parts["loss/routed_ce"]
        missing = F.relu(4 - (1 - student.gates[:, -1]).sum())  # the quota sees the gates of the whole batch
        assert routing.parts["loss/policy"] == pytest.approx(
            (routed_ce * (3 if routed_ce > ce else 1 / 3) + missing).item(), rel=1e-6
        )

    def test_the_gradient_of_random_halves_is_on_average_that_of_the_whole_batch(self):
        """All 70 halves of eight samples; the adapters' BatchNorm normalises each sample by itself."""
        batch = toy_batch(8)
        batch = batch._replace(image=batch.image.double())
        total = None

        def gradient(share, order):
            task = toy_task("at", routing_share=share).double()
            task.router.eval()
            task.student.eval()

            def same_gates(seen):  # each sample has the gates that it has in the whole batch
                torch.manual_seed(3)
                logits = task.policy(seen)
                noise = -torch.empty(8, 3, 2, dtype=torch.float64).exponential_().log()[order]
                soft = F.softmax((logits + noise) / 5, dim=-1)[..., 0]
                return (soft >= 0.5).double() + soft - soft.detach()

            task.draw_gates = same_gates
            return self.policy_gradients(task, Batch(*(part[order] for part in batch)))

        whole = gradient(1, list(range(8)))
        halves = list(itertools.combinations(range(8), 4))
        for half in halves:
            found = gradient(0.5, [*half, *(i for i in range(8) if i not in half)])
            total = found if total is None else {name: total[name] + found[name] for name in found}
        largest = max(value.abs().max() for value in whole.values())
        for name, expected in whole.items():
            torch.testing.assert_close(total[name] / len(halves), expected, rtol=1e-9, atol=1e-12 * largest, msg=name)
