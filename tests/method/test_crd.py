"""CRD's negatives, its memory banks and its normalisers. Its loss itself is in test_losses."""

from __future__ import annotations

import pytest
import torch
from distiller_inputs import Largest

from datasets.batch import Batch
from distillers.base import Setting
from distillers.crd import CRD, UNSET, Contrast, MemoryBank, NegativeSampler

BATCH, SAMPLES, WIDTH = 6, 30, 8
STUDENT, TEACHER = (5,), (7,)
LABELS = torch.tensor([2, 0, 1] * 6 + [0] * 12)  # 18, 6 and 6 samples of classes 0, 1 and 2
SOME = torch.tensor([1.0, 0, 1, 1, 0, 0])
ALL, NONE = torch.ones(BATCH), torch.zeros(BATCH)
INDEX = torch.tensor([4, 29, 0, 11, 7, 20])


def setting(labels=LABELS) -> Setting:
    return Setting([STUDENT], [TEACHER], labels, feat_dim=WIDTH)


def step(distiller: CRD, gate=ALL, seed: int = 0, index=INDEX):
    """One forward pass on features and negatives that follow from `seed`; the loss and the student's feature."""
    torch.manual_seed(seed)
    student = torch.randn(BATCH, *STUDENT, requires_grad=True)
    teacher = torch.randn(BATCH, *TEACHER)
    batch = Batch(torch.zeros(BATCH, 3, 1, 1), LABELS[index], index)
    return distiller([student], [teacher], gate[:, None], batch)[0], student


def make_contrast(**changes) -> Contrast:
    options = {"samples": SAMPLES, "width": WIDTH, "temperature": 0.07, "momentum": 0.5} | changes
    return Contrast(STUDENT, TEACHER, **options)


def contrast_inputs(gate=ALL, seed: int = 0):
    """Embeddings, gate and candidates (the batch itself and any 12 samples) of `Contrast.contrast`."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, BATCH, WIDTH, generator=generator)
    negatives = torch.randint(SAMPLES, (BATCH, 12), generator=generator)
    return student, teacher, gate, torch.cat([INDEX[:, None], negatives], dim=1)


def banks(contrast: Contrast) -> torch.Tensor:
    return torch.stack([contrast.student_bank.rows, contrast.teacher_bank.rows])


class TestNegatives:
    @pytest.mark.parametrize(
        "labels",
        [LABELS * 1000 - 7, torch.arange(SAMPLES) // 15, LABELS.flip(0)],
        ids=["any numbers, unequal classes", "sorted", "reversed"],
    )
    def test_are_never_of_the_samples_own_class_and_reach_all_others(self, labels):
        index = torch.randperm(SAMPLES)
        drawn = NegativeSampler(labels)(index, 2000)
        for sample, others in zip(index, drawn):
            assert set(others.tolist()) == set((labels != labels[sample]).nonzero()[:, 0].tolist())

    def test_are_uniform_over_the_other_classes(self):
        draws = 200_000
        drawn = NegativeSampler(LABELS)(torch.tensor([0, 1, 2]), draws)
        for sample, others in zip((0, 1, 2), drawn):
            share = torch.bincount(others, minlength=SAMPLES) / draws
            possible = LABELS[sample] != LABELS
            p = 1 / possible.sum()
            five_sigma = 5 * (p * (1 - p) / draws).sqrt()
            assert (share[possible] - p).abs().max() < five_sigma

    def test_are_independent_from_sample_to_sample(self):
        first, second = NegativeSampler(LABELS)(torch.tensor([1, 4]), 1000)  # two samples of one class
        assert 0 < (first == second).double().mean() < 0.2

    def test_are_at_most_as_many_as_the_largest_class_leaves(self):
        assert (CRD(setting()).negatives, CRD(setting(), negatives=7).negatives) == (12, 7)


class TestBanks:
    def test_start_with_rows_of_about_unit_length(self):
        rows = MemoryBank(20_000, 128).rows
        assert rows.abs().max() <= (3 / 128) ** 0.5
        assert rows.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)

    def test_are_only_read_in_evaluation(self):
        distiller = CRD(setting())
        before = {key: value.clone() for key, value in distiller.state_dict().items()}
        loss, _ = step(distiller.eval())
        assert loss.isfinite()
        assert loss > 0
        for key, value in distiller.state_dict().items():
            assert torch.equal(value, before[key])

    def test_travel_in_the_state_dict_and_the_table_of_classes_does_not(self):
        keys = {key.removeprefix("contrasts.0.") for key, _ in CRD(setting()).named_buffers()}
        saved = {key.removeprefix("contrasts.0.") for key in CRD(setting()).state_dict()}
        in_banks = {f"{side}_bank.{what}" for side in ("student", "teacher") for what in ("rows", "normalizer")}
        assert saved == in_banks | {
            f"embed_{side}.1.{p}" for side in ("student", "teacher") for p in ("weight", "bias")
        }
        assert keys - saved == {"sampler.order", "sampler.start", "sampler.size"}


class TestNormalizer:
    def test_waits_for_the_first_chosen_sample(self):
        contrast = make_contrast()
        assert contrast.contrast(*contrast_inputs(NONE)) == 0
        assert contrast.student_bank.normalizer == UNSET
        assert contrast.contrast(*contrast_inputs(SOME)) > 0
        assert contrast.student_bank.normalizer > 0


class TestContrast:
    def test_scales_its_gradient_with_what_comes_after(self):
        """The gradient is worked out in the forward pass; a weight applied to the loss must still reach it."""
        student, teacher, gate, candidates = contrast_inputs()
        student.requires_grad_()
        contrast = make_contrast().eval()
        (once,) = torch.autograd.grad(contrast.contrast(student, teacher, gate, candidates), student)
        (thrice,) = torch.autograd.grad(3 * contrast.contrast(student, teacher, gate, candidates), student)
        torch.testing.assert_close(thrice, 3 * once)

    def test_works_without_gradients(self):
        with torch.no_grad():
            assert make_contrast().contrast(*contrast_inputs()) > 0

    def test_holds_nothing_of_the_size_of_batch_times_negatives_times_width(self):
        labels = torch.arange(2000) % 2
        distiller = CRD(Setting([STUDENT], [TEACHER], labels, feat_dim=64), negatives=1000)
        batch = Batch(torch.zeros(BATCH, 3, 1, 1), labels[INDEX], INDEX)
        with Largest() as largest:
            distiller([torch.randn(BATCH, *STUDENT)], [torch.randn(BATCH, *TEACHER)], ALL[:, None], batch)
        assert largest.size <= 2000 * 64  # a bank; the vectors of all negatives would be three times that
