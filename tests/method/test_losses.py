"""What whole steps (test_fast_path) do not show of the losses: other constants and shapes, features that coincide."""

from __future__ import annotations

from functools import partial

import plain_losses as plain
import pytest
import torch
from distiller_inputs import Largest

from distillers.fsp import fsp_loss
from distillers.logits import dist_loss, distillation_kl, dkd_loss, nkd_loss, standardized, wttm_loss
from distillers.nst import nst_loss
from distillers.pkt import pkt_loss
from distillers.reviewkd import hierarchical_context_loss
from distillers.rkd import rkd_loss

BATCH = 7
GATE = torch.tensor([1, 0, 0, 1, 1, 0, 1], dtype=torch.float64)
LABELS = torch.tensor([1, 0, 1, 1, 0, 0, 1])
DKD = {"temperature": 2.5, "target": 0.7, "nontarget": 3}
CASES = {  # the loss, its plain formula, shapes of what both take, their constants
    "fsp, strided": (fsp_loss, plain.fsp, [(3, 4, 4), (5, 2, 2), (3, 6, 6), (5, 3, 3)], {}),
    "hcl, odd": (hierarchical_context_loss, plain.reviewkd, 2 * [(3, 5, 3)], {}),
    "rkd, maps": (rkd_loss, plain.rkd, [(2, 3, 3), (3, 2, 2)], {}),
    "kl": (distillation_kl, plain.kl, 2 * [(5,)], {"temperature": 2.5}),
    "dkd": (dkd_loss, plain.dkd, 2 * [(5,)], DKD),
    "dkd, two classes": (dkd_loss, plain.dkd, 2 * [(2,)], DKD),
    "dist": (dist_loss, plain.dist, 2 * [(5,)], {"temperature": 2.5, "inter": 0.7, "intra": 3}),
    "nkd": (nkd_loss, plain.nkd, 2 * [(5,)], {"gamma": 0.7, "tau": 2.5}),
    "nkd, two classes": (nkd_loss, plain.nkd, 2 * [(2,)], {}),
    "wttm": (wttm_loss, plain.wttm, 2 * [(5,)], {"power": 0.7}),
}


@pytest.fixture(autouse=True)
def double():
    """Plain formulas make what they need from plain numbers in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def value_and_gradients(loss, *inputs):
    value = loss(*inputs)
    return value, torch.autograd.grad(value, inputs)


@pytest.mark.parametrize(("loss", "formula", "shapes", "constants"), CASES.values(), ids=CASES)
def test_value_and_gradient_are_those_of_the_formula_over_the_chosen_samples(loss, formula, shapes, constants):
    torch.manual_seed(0)
    inputs = [(torch.randn(BATCH, *shape) + 0.3).requires_grad_() for shape in shapes]
    chosen, takes_labels = GATE > 0, loss in (dkd_loss, nkd_loss)
    own = partial(loss, **constants, **({"label": LABELS} if takes_labels else {}))
    gathered = partial(formula, **constants, **({"label": LABELS[chosen]} if takes_labels else {}))
    found = value_and_gradients(lambda *x: own(*x, GATE), *inputs)
    expected = value_and_gradients(lambda *x: gathered(*(each[chosen] for each in x)) * GATE.mean(), *inputs)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12)
    single = own(*(x.detach().float() for x in inputs), GATE.float())
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected[0].item(), rel=1e-5, abs=1e-6)


def test_standardised_logits_have_mean_0_and_deviation_1_by_the_formula():
    logits = torch.randn(BATCH, 5).requires_grad_()
    found, expected = (
        value_and_gradients(lambda z, f=f: (f(z) ** 3).sum(), logits) for f in (standardized, plain.standardized)
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(standardized(logits).std(dim=1), torch.ones(BATCH), rtol=1e-6, atol=0)
    # As of a classifier that begins at zero. The published form sends it gradients of up to 1e7.
    weights = torch.linspace(-1, 1, 5)
    for begin in (torch.zeros(BATCH, 5), 1e-6 * torch.randn(BATCH, 5)):
        _, (gradient,) = value_and_gradients(lambda z: (standardized(z) * weights).sum(), begin.requires_grad_())
        assert 0 < gradient.abs().max() < 101


class TestRKD:
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
        inputs = torch.randn(BATCH, 5), torch.randn(BATCH, 9), torch.ones(BATCH)
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
