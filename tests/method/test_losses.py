"""Each loss and its gradient against the plain formula over the chosen samples, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import plain_losses as plain
import pytest
import torch
from distiller_inputs import Largest
from torch import Tensor

from distillers.at import at_loss
from distillers.cc import cc_loss
from distillers.crd import crd_loss
from distillers.fitnet import fitnet_loss
from distillers.fsp import fsp_loss
from distillers.ft import ft_loss
from distillers.logits import dist_loss, distillation_kl, dkd_loss, nkd_loss, standardized, wttm_loss
from distillers.nst import nst_loss
from distillers.pkt import pkt_loss
from distillers.reviewkd import hierarchical_context_loss
from distillers.rkd import rkd_loss
from distillers.sp import sp_loss
from distillers.vid import vid_loss

BATCH = 7
GATES = {
    "some": [1, 0, 0, 1, 1, 0, 1],
    "all": [1] * BATCH,
    "one": [0, 0, 0, 0, 1, 0, 0],
    "none": [0] * BATCH,
}
LABELS = torch.tensor([1, 0, 1, 1, 0, 0, 1])  # of the losses that need any; there are two classes or more


@pytest.fixture(autouse=True)
def double():
    """Plain formulas make what they need from plain numbers in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@dataclass
class Case:
    """A loss, its plain formula, and the shapes of what both take: without the batch dimension, or of one for all."""

    loss: Callable[..., Tensor]
    plain: Callable[..., Tensor]
    shapes: list[tuple[int, ...]]
    shared: int | None = None  # which argument has no batch dimension
    positive: bool = False
    labels: bool = False

    def inputs(self, seed: int = 0) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        shapes = [shape if k == self.shared else (BATCH, *shape) for k, shape in enumerate(self.shapes)]
        values = [torch.randn(shape, generator=generator, dtype=torch.float64) + 0.3 for shape in shapes]
        return [value.exp() if self.positive else value for value in values]

    def masked(self, inputs: list[Tensor], gate: Tensor) -> Tensor:
        return self.loss(*inputs, gate, *([LABELS] if self.labels else []))

    def expected(self, inputs: list[Tensor], gate: Tensor) -> Tensor:
        """The plain loss of the chosen samples, times their share."""
        chosen = gate > 0
        if not chosen.any():
            return sum(0 * x.sum() for x in inputs)
        rows = [x if k == self.shared else x[chosen] for k, x in enumerate(inputs)]
        return self.plain(*rows, *([LABELS[chosen]] if self.labels else [])) * gate.mean()


def case_of(loss, formula, *shapes, **options) -> Case:
    return Case(loss, formula, list(shapes), **options)


def of_logits(loss, formula, *, classes: int = 5, labels: bool = False, **constants) -> Case:
    return Case(partial(loss, **constants), partial(formula, **constants), 2 * [(classes,)], labels=labels)


DECOUPLED = {"labels": True, "temperature": 2.5, "target": 0.7, "nontarget": 3}
CASES = {
    "at": case_of(at_loss, plain.at, (3, 4, 4), (5, 4, 4)),
    "at, other sizes": case_of(at_loss, plain.at, (3, 5, 7), (2, 3, 4)),
    "fitnet": case_of(fitnet_loss, plain.fitnet, (3, 4, 4), (3, 4, 4)),
    "sp": case_of(sp_loss, plain.sp, (3, 4, 4), (5, 2, 2)),
    "rkd": case_of(rkd_loss, plain.rkd, (5,), (9,)),
    "cc": case_of(cc_loss, plain.cc, (6,), (6,)),
    "vid": case_of(vid_loss, plain.vid, (4, 3, 3), (4,), (4, 3, 3), shared=1),
    "pkt": case_of(pkt_loss, plain.pkt, (5,), (9,)),
    "ft, other sizes": case_of(ft_loss, plain.ft, (3, 3, 3), (5, 4, 4)),
    "fsp": case_of(fsp_loss, plain.fsp, (3, 4, 4), (5, 4, 4), (3, 4, 4), (5, 4, 4)),
    "fsp, strided": case_of(fsp_loss, plain.fsp, (3, 4, 4), (5, 2, 2), (3, 6, 6), (5, 3, 3)),
    "fsp, by positions": case_of(fsp_loss, plain.fsp, (9, 1, 2), (9, 1, 2), (9, 1, 2), (9, 1, 2)),
    "nst, by channels": case_of(nst_loss, plain.nst, (2, 4, 4), (3, 4, 4)),
    "nst, by positions": case_of(nst_loss, plain.nst, (6, 2, 2), (9, 4, 4)),
    "hcl": case_of(hierarchical_context_loss, plain.reviewkd, (3, 8, 8), (3, 8, 8)),
    "hcl, odd": case_of(hierarchical_context_loss, plain.reviewkd, (3, 5, 3), (3, 5, 3)),
    "kl": of_logits(distillation_kl, plain.kl, temperature=2.5),
    "dkd": of_logits(dkd_loss, plain.dkd, **DECOUPLED),
    "dkd, two classes": of_logits(dkd_loss, plain.dkd, classes=2, **DECOUPLED),
    "dist": of_logits(dist_loss, plain.dist, temperature=2.5, inter=0.7, intra=3),
    "nkd": of_logits(nkd_loss, plain.nkd, labels=True, gamma=0.7, tau=2.5),
    "nkd, two classes": of_logits(nkd_loss, plain.nkd, labels=True, classes=2),
    "wttm": of_logits(wttm_loss, plain.wttm, power=0.7),
    "crd": case_of(
        partial(crd_loss, samples=50), partial(plain.crd, samples=50), (), (12,), (), shared=2, positive=True
    ),
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_gate = pytest.mark.parametrize("gate", GATES.values(), ids=GATES)


def value_and_gradients(loss: Callable[..., Tensor], inputs: list[Tensor], gate: Tensor):
    inputs = [x.clone().requires_grad_() for x in inputs]
    value = loss(inputs, gate)
    return value.detach(), torch.autograd.grad(value, inputs)


@every_case
@every_gate
def test_value_and_gradient_are_those_of_the_formula_over_the_chosen_samples(case, gate):
    inputs, gate = case.inputs(), torch.tensor(gate, dtype=torch.float64)
    value, gradients = value_and_gradients(case.masked, inputs, gate)
    expected, wanted = value_and_gradients(case.expected, inputs, gate)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-13)
    for k, (found, right) in enumerate(zip(gradients, wanted)):
        torch.testing.assert_close(found, right, rtol=1e-8, atol=1e-12)
        assert k == case.shared or not found[gate == 0].any()
    single = case.masked([x.float() for x in inputs], gate.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6 * gate.mean().item())


@every_case
@pytest.mark.parametrize("chosen", [0, 3])
def test_dead_features_leave_loss_and_gradient_finite(case, chosen):
    """All activations zero, as after a ReLU gone wrong: every norm and every distance is zero."""
    gate = (torch.arange(BATCH) < chosen).double()
    dead = [torch.zeros_like(x) if not case.positive else torch.ones_like(x) for x in case.inputs()]
    value, gradients = value_and_gradients(case.masked, dead, gate)
    assert value.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_standardised_logits_have_mean_0_and_deviation_1_by_the_formula():
    (logits, _), gate = CASES["kl"].inputs(), torch.ones(BATCH)
    found = value_and_gradients(lambda inputs, _: (standardized(inputs[0]) ** 3).sum(), [logits], gate)
    expected = value_and_gradients(lambda inputs, _: (plain.standardized(inputs[0]) ** 3).sum(), [logits], gate)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(standardized(logits).std(dim=1), torch.ones(BATCH), rtol=1e-6, atol=0)
    (_, (gradient,)) = value_and_gradients(lambda inputs, _: standardized(inputs[0]).sum(), [0 * logits], gate)
    assert gradient.isfinite().all()


class TestRKD:
    def test_treats_samples_in_the_same_place_as_without_direction(self):
        student, teacher = CASES["rkd"].inputs()
        student[4], teacher[1] = student[2], teacher[0]
        torch.testing.assert_close(rkd_loss(student, teacher, torch.ones(BATCH)), plain.rkd(student, teacher))

    @pytest.mark.parametrize("offset", [0.0, 100.0])
    def test_recognises_coincidence_far_from_the_origin_too(self, offset):
        """Dot products of large equal vectors do not cancel exactly; what is left is no distance."""
        generator = torch.Generator().manual_seed(0)
        student, teacher = (torch.rand(16, 300, generator=generator, dtype=torch.float32) + offset for _ in range(2))
        student[8:] = student[:8]
        student.requires_grad_()
        loss = rkd_loss(student, teacher, torch.ones(16, dtype=torch.float32))
        expected = plain.rkd(student.detach().double(), teacher.double())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.abs().max() < 10

    def test_weighs_distances_and_angles_apart(self):
        inputs = (*CASES["rkd"].inputs(), torch.ones(BATCH))
        distance = rkd_loss(*inputs, distance=1, angle=0)
        angle = rkd_loss(*inputs, distance=0, angle=1)
        torch.testing.assert_close(rkd_loss(*inputs), 25 * distance + 50 * angle)


def test_pkt_of_networks_that_almost_agree_is_more_than_rounding():
    """The loss is the tiny difference of large terms, and is multiplied by 30000."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.rand(64, 256, generator=generator, dtype=torch.float32)
    student = teacher + 1e-3 * torch.randn(64, 256, generator=generator, dtype=torch.float32)
    expected = plain.pkt(student.double(), teacher.double())
    found = pkt_loss(student, teacher, torch.ones(64, dtype=torch.float32))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_selectivity_never_builds_a_matrix_larger_than_the_smaller_way_needs():
    """A [B, C, C, HW] tensor would have 268 million elements here, the C x C products a million."""
    student, teacher = torch.randn(1, 512, 4, 4), torch.randn(1, 512, 4, 4)
    with Largest() as largest:
        nst_loss(student, teacher, torch.ones(1))
    assert largest.size == student.numel()
