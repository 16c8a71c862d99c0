"""What all distillers have in common; run for every file in distillers/, also one that a user has added."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from captured_steps import Training
from distiller_inputs import (
    GATES,
    LARGER_MAPS,
    NAMES,
    ODD_MAPS,
    SPOTTED,
    STUDENT,
    build,
    every_distiller,
    every_spotted,
    gradients,
    make_inputs,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from datasets.batch import Batch
from distillers.spot_adaptive.selection import SELECTIONS


class TestEveryDistiller:
    @every_spotted
    def test_costs_nothing_and_moves_nothing_when_no_sample_is_chosen(self, name):
        distiller = build(name)
        features, *rest = make_inputs(name, gate=GATES["none"])
        losses = distiller(features, *rest)
        losses.sum().backward()
        assert not losses.any()
        found = gradients(distiller, features)
        assert found
        assert not any(gradient.any() for gradient in found)

    @every_spotted
    @pytest.mark.parametrize("gate", ["one", "some"])
    def test_stays_finite_where_all_features_are_dead(self, name, gate):
        """All activations zero, as after a ReLU gone wrong: every norm and every distance is zero."""
        distiller, (features, teacher, *rest) = build(name), make_inputs(name, gate=GATES[gate])
        features = [torch.zeros_like(x).requires_grad_() for x in features]
        losses = distiller(features, [torch.zeros_like(x) for x in teacher], *rest)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert all(gradient.isfinite().all() for gradient in gradients(distiller, features))

    # CRD draws its negatives per batch: test_crd compares it with the negatives held fixed.
    @pytest.mark.parametrize("name", [name for name in SPOTTED if name != "crd"])
    @pytest.mark.parametrize("gate", ["all", "some", "one"])
    def test_equals_the_plain_loss_of_the_chosen_samples_times_their_share(self, name, gate):
        distiller = build(name).double().eval()  # in training, BatchNorm sees the samples that are not chosen
        chosen, share = GATES[gate] > 0, GATES[gate].double().mean()
        features, teacher, gates, batch = make_inputs(name, gate=GATES[gate])
        features = [x.detach().double().requires_grad_() for x in features]
        gathered = [x.detach()[chosen].requires_grad_() for x in features]
        teacher = [x.double() for x in teacher]

        masked = distiller(features, teacher, gates.double(), batch)
        masked.sum().backward()
        found = gradients(distiller, [])
        distiller.zero_grad()
        plain = share * distiller(gathered, [x[chosen] for x in teacher], torch.ones_like(gates[chosen]), batch)
        plain.sum().backward()

        torch.testing.assert_close(masked, plain, rtol=1e-9, atol=1e-13, check_dtype=False)
        for mine, wanted in zip(found, gradients(distiller, [])):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-13)
        for mine, wanted in zip(features, gathered):
            if wanted.grad is not None:
                torch.testing.assert_close(mine.grad[chosen], wanted.grad, rtol=1e-9, atol=1e-13)

    @every_spotted
    def test_gives_every_spot_its_own_gate(self, name):
        spots = [(1, 1), (2, 2), (3, 3)]
        features, teacher, gates, batch = make_inputs(name, spots=spots)
        for k in range(3):
            losses = build(name, spots=spots)(features, teacher, F.one_hot(torch.tensor(k), 3) * gates, batch)
            assert losses.nonzero().tolist() == [[k]]

    @every_spotted
    def test_sends_gradients_to_its_spots_and_everything_it_trains_but_not_to_the_teacher(self, name):
        distiller = build(name)
        features, teacher, *rest = make_inputs(name)
        teacher = [x.requires_grad_() for x in teacher]
        distiller(features, teacher, *rest).sum().backward()
        assert all(features[spot.student].grad.any() for spot in distiller.spots)
        fixed = set(distiller.teacher.parameters()) if name == "cc" else set()
        for parameter in distiller.main_parameters():
            assert parameter.grad is None if parameter in fixed else parameter.grad.any()
        assert all(x.grad is None for x in teacher)

    @every_spotted
    @pytest.mark.parametrize("teacher", [LARGER_MAPS, ODD_MAPS], ids=["larger", "odd"])
    def test_takes_a_teacher_with_other_map_sizes(self, name, teacher):
        features, *rest = make_inputs(name, STUDENT, teacher)
        losses = build(name, STUDENT, teacher)(features, *rest)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert losses.all()

    @every_spotted
    def test_takes_a_spot_with_unequal_indices(self, name):
        longer = [STUDENT[0], *STUDENT]  # FSP, too, finds equal widths when the teacher's index is one more
        distiller = build(name, STUDENT, longer, spots=[(2, 3)])
        assert distiller(*make_inputs(name, STUDENT, longer, spots=[(2, 3)])).isfinite().all()

    @every_distiller
    def test_stays_in_float32_under_autocast(self, name):
        reference = build(name)(*make_inputs(name))
        features, teacher, gates, batch = make_inputs(name)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            half = [[x.bfloat16() for x in side] for side in (features, teacher)]
            losses = build(name)(*half, gates, batch)
        assert losses.dtype == torch.float32
        # Half precision has 8 bits; the loss itself must add nothing to what its inputs lost.
        torch.testing.assert_close(losses, reference, rtol=0.05, atol=1e-4)
        if not list(build(name).parameters()):  # then its inputs are the features themselves
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.equal(build(name)(*make_inputs(name)), reference)

    @every_distiller
    def test_computes_without_looking_at_a_value(self, name):
        """What works on tensors that have a shape and no values neither waits for the device nor changes shape."""
        distiller = build(name)
        run_on_shapes_alone(distiller, *make_inputs(name, gate=GATES["some"]))

    @every_distiller
    def test_returns_from_its_state_dict(self, name):
        first, second = build(name, seed=1), build(name, seed=2)
        inputs = make_inputs(name)
        first(*inputs)  # running statistics and banks move
        second.load_state_dict(first.state_dict())
        for distiller in (first, second):
            distiller.train()
        torch.manual_seed(3)
        expected = first(*inputs)
        torch.manual_seed(3)
        assert torch.equal(second(*inputs), expected)


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        *((name, "adaptive") for name in NAMES),
        *itertools.product(("at", "crd"), sorted(set(SELECTIONS) - {"adaptive"})),
    ],
)
def test_steps_of_two_images_the_fewest_that_there_are_stay_finite(name, selection):
    training = Training(name, selection=selection).take([2, 2])
    assert (training.meter.finite_steps == 2).all()
    assert all(tensor.isfinite().all() for tensor in training.task.state_dict().values())


def run_on_shapes_alone(module: nn.Module, features, teacher, gates, batch) -> None:
    """Forward and backward with fake tensors, on which anything that needs a value raises an error."""
    with FakeTensorMode() as mode:
        state = {
            name: mode.from_tensor(x) for name, x in itertools.chain(module.named_parameters(), module.named_buffers())
        }
        features, teacher = ([mode.from_tensor(x) for x in side] for side in (features, teacher))
        batch = Batch(*(mode.from_tensor(x) for x in batch))
        losses = torch.func.functional_call(module, state, (features, teacher, mode.from_tensor(gates), batch))
        if len(losses):
            losses.sum().backward()
