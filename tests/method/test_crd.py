"""CRD's negatives and its memory banks. Its loss itself is in test_losses."""

from __future__ import annotations

import pytest
import torch
from distiller_inputs import Largest

from datasets.batch import Batch
from distillers.base import Setting
from distillers.crd import CRD, MemoryBank, NegativeSampler

BATCH, SAMPLES, WIDTH = 6, 30, 8
STUDENT, TEACHER = (5,), (7,)
LABELS = torch.tensor([2, 0, 1] * 6 + [0] * 12)  # 18, 6 and 6 samples of classes 0, 1 and 2
INDEX = torch.tensor([4, 29, 0, 11, 7, 20])


def setting(labels=LABELS) -> Setting:
    return Setting([STUDENT], [TEACHER], labels, feat_dim=WIDTH)


def loss_of(distiller: CRD) -> torch.Tensor:
    """That of one forward pass."""
    student, teacher = torch.randn(BATCH, *STUDENT, requires_grad=True), torch.randn(BATCH, *TEACHER)
    batch = Batch(torch.zeros(BATCH, 3, 1, 1), LABELS[INDEX], INDEX)
    return distiller([student], [teacher], torch.ones(BATCH, 1), batch)[0]


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
        loss = loss_of(distiller.eval())
        assert loss.isfinite()
        assert loss > 0
        for key, value in distiller.state_dict().items():
            assert torch.equal(value, before[key])

    def test_score_many_anchors_as_each_alone(self):
        bank, anchor, candidates = MemoryBank(SAMPLES, WIDTH), torch.randn(40, WIDTH), torch.randint(SAMPLES, (40, 5))
        expected = ((anchor[:, None] * bank.rows[candidates]).sum(dim=2) / 0.5).exp()
        torch.testing.assert_close(bank.scores(anchor, candidates, 0.5), expected)

    def test_alone_are_saved_and_not_the_table_of_classes(self):
        assert not [key for key in CRD(setting()).state_dict() if "sampler" in key]


def test_works_without_gradients():
    with torch.no_grad():
        assert loss_of(CRD(setting())) > 0


def test_holds_nothing_of_the_size_of_batch_times_negatives_times_width():
    labels = torch.arange(2000) % 2
    distiller = CRD(Setting([STUDENT], [TEACHER], labels, feat_dim=64), negatives=1000)
    batch = Batch(torch.zeros(BATCH, 3, 1, 1), labels[INDEX], INDEX)
    with Largest() as largest:
        distiller([torch.randn(BATCH, *STUDENT)], [torch.randn(BATCH, *TEACHER)], torch.ones(BATCH, 1), batch)
    assert largest.size <= 2000 * 64  # a bank; the vectors of all negatives would be three times that
