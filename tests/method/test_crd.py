"""CRD's negatives, its memory banks and its normalisers. Its loss itself is in test_losses."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

from datasets.batch import Batch
from distillers.base import Setting
from distillers.crd import CRD, UNSET, Contrast, MemoryBank, NegativeSampler, crd_loss
from utils.errors import UserError

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


def as_double(inputs):
    return [x.double() if x.is_floating_point() else x for x in inputs]


def banks(contrast: Contrast) -> torch.Tensor:
    return torch.stack([contrast.student_bank.rows, contrast.teacher_bank.rows])


class TestNegatives:
    @pytest.mark.parametrize(
        "labels",
        [LABELS, LABELS * 1000 - 7, torch.arange(SAMPLES), torch.arange(SAMPLES) // 15, LABELS.flip(0)],
        ids=["unequal classes", "any numbers", "one each", "sorted", "reversed"],
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

    def test_follow_the_seed(self):
        sampler = NegativeSampler(LABELS)
        draws = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            draws.append(sampler(INDEX, 50))
        assert torch.equal(draws[0], draws[1])
        assert not torch.equal(draws[0], draws[2])

    def test_are_as_many_as_asked_for_if_the_largest_class_leaves_as_many(self, caplog):
        caplog.set_level(logging.INFO, "sakd")
        assert CRD(setting(), negatives=12).negatives == 12
        assert not caplog.records

    def test_are_at_most_as_many_as_the_largest_class_leaves_which_is_logged_once(self, caplog):
        caplog.set_level(logging.INFO, "sakd")
        distiller = CRD(setting())
        assert distiller.negatives == 12
        for _ in range(2):
            step(distiller)
        assert [record.getMessage() for record in caplog.records] == [
            "crd: 12 negatives instead of 16384, as many samples as there are outside of the largest class"
        ]

    def test_need_a_second_class(self):
        with pytest.raises(UserError, match="crd: all 30 training samples are of one class") as error:
            CRD(setting(torch.full((SAMPLES,), 3)))
        assert "\n" not in str(error.value)


class TestBanks:
    def test_move_by_the_momentum_formula_at_the_chosen_samples_and_nowhere_else(self):
        contrast = make_contrast(momentum=0.8)
        before = banks(contrast).clone()
        student, teacher, gate, candidates = contrast_inputs(SOME)
        contrast.contrast(student, teacher, gate, candidates)
        expected = before.clone()
        for k, embeddings in enumerate((student, teacher)):
            for sample, embedding, chosen in zip(INDEX, embeddings, SOME):
                if chosen:
                    row = 0.8 * before[k, sample] + 0.2 * embedding / embedding.norm()
                    expected[k, sample] = row / row.norm()
        torch.testing.assert_close(banks(contrast), expected)
        untouched = torch.ones(SAMPLES, dtype=torch.bool)
        untouched[INDEX[SOME > 0]] = False
        assert torch.equal(banks(contrast)[:, untouched], before[:, untouched])

    def test_keep_unit_vectors(self):
        contrast = make_contrast()
        for seed in range(3):
            contrast.contrast(*contrast_inputs(seed=seed))
        torch.testing.assert_close(banks(contrast)[:, INDEX].norm(dim=2), torch.ones(2, BATCH))

    def test_start_with_rows_of_about_unit_length(self):
        rows = MemoryBank(20_000, 128).rows
        assert rows.abs().max() <= (3 / 128) ** 0.5
        assert rows.norm(dim=1).mean().item() == pytest.approx(1, abs=0.01)

    def test_give_the_scores_as_they_were_before_the_update(self):
        contrast = make_contrast(momentum=0.0)  # the update replaces the rows altogether
        inputs = contrast_inputs()
        contrast.eval()
        expected = contrast.contrast(*inputs)
        contrast.train()
        assert torch.equal(contrast.contrast(*inputs), expected)

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

    def test_let_training_go_on_exactly_after_a_restart(self):
        first = CRD(setting())
        step(first, SOME)
        second = CRD(setting())
        second.load_state_dict(first.state_dict())
        losses = [[step(distiller, SOME, seed)[0].item() for seed in (5, 6)] for distiller in (first, second)]
        assert losses[0] == losses[1]


class TestNormalizer:
    def test_is_set_from_the_chosen_samples_of_the_first_batch_and_then_stays(self):
        contrast = make_contrast()
        student, teacher, gate, candidates = contrast_inputs(SOME)
        student_rows, teacher_rows = banks(contrast).clone()
        contrast.contrast(student, teacher, gate, candidates)
        first = []
        for anchors, rows, bank in (
            (student, teacher_rows, contrast.teacher_bank),
            (teacher, student_rows, contrast.student_bank),
        ):
            vectors = rows[candidates[SOME > 0]]
            similarity = torch.einsum("bd,bkd->bk", F.normalize(anchors, dim=1)[SOME > 0], vectors)
            expected = SAMPLES * (similarity / 0.07).exp().mean()
            torch.testing.assert_close(bank.normalizer, expected, rtol=1e-5, atol=0)
            first.append(bank.normalizer.clone())
        contrast.contrast(*contrast_inputs(seed=9))
        assert [contrast.teacher_bank.normalizer, contrast.student_bank.normalizer] == first

    def test_waits_for_the_first_chosen_sample(self):
        contrast = make_contrast()
        assert contrast.contrast(*contrast_inputs(NONE)) == 0
        assert contrast.student_bank.normalizer == UNSET
        assert contrast.contrast(*contrast_inputs(SOME)) > 0
        assert contrast.student_bank.normalizer > 0


class TestContrast:
    @pytest.mark.parametrize("gate", [ALL, SOME, NONE], ids=["all", "some", "none"])
    def test_has_value_and_gradient_of_gathering_vectors_although_the_banks_move_in_between(self, gate):
        contrast = make_contrast().double()
        contrast.contrast(*as_double(contrast_inputs(seed=1)))  # sets the normalisers
        student, teacher, _, candidates = as_double(contrast_inputs(seed=2))
        student, teacher = student.requires_grad_(), teacher.requires_grad_()
        rows, chosen = banks(contrast).clone(), gate > 0

        expected = torch.zeros((), dtype=torch.float64)
        for anchors, memory, bank in (
            (student, rows[1], contrast.teacher_bank),
            (teacher, rows[0], contrast.student_bank),
        ):
            unit = anchors[chosen] / anchors[chosen].norm(dim=1, keepdim=True)
            scores = torch.einsum("bd,bkd->bk", unit, memory[candidates[chosen]]).div(0.07).exp()
            ones = torch.ones(len(scores), dtype=torch.float64)
            if len(scores):
                loss = crd_loss(scores[:, 0], scores[:, 1:], bank.normalizer, ones, samples=SAMPLES)
                expected = expected + loss * gate.double().mean()
        wanted = (
            torch.autograd.grad(expected, (student, teacher))
            if chosen.any()
            else (torch.zeros_like(student), torch.zeros_like(teacher))
        )

        found = contrast.contrast(student, teacher, gate, candidates)
        assert torch.equal(banks(contrast), rows) == (not chosen.any())
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-13)
        found.backward()
        for x, gradient in zip((student, teacher), wanted):
            torch.testing.assert_close(x.grad, gradient, rtol=1e-9, atol=1e-12)

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

    def test_trains_both_embeddings_and_the_student(self):
        distiller = CRD(setting())
        loss, student = step(distiller, SOME)
        loss.backward()
        assert all(parameter.grad.any() for parameter in distiller.parameters())
        assert student.grad[SOME > 0].any(dim=1).all()
        assert not student.grad[SOME == 0].any()

    def test_is_the_same_under_the_same_seed(self):
        losses = []
        for _ in range(2):
            torch.manual_seed(7)
            distiller = CRD(setting())
            losses.append([step(distiller, SOME, seed)[0].item() for seed in range(3)])
        assert losses[0] == losses[1]

    def test_holds_nothing_of_the_size_of_batch_times_negatives_times_width(self):
        largest = 0

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                nonlocal largest
                out = function(*args, **(kwargs or {}))
                for x in out if isinstance(out, tuple) else (out,):
                    if isinstance(x, torch.Tensor):
                        largest = max(largest, x.numel())
                return out

        labels = torch.arange(2000) % 2
        distiller = CRD(Setting([STUDENT], [TEACHER], labels, feat_dim=64), negatives=1000)
        batch = Batch(torch.zeros(BATCH, 3, 1, 1), labels[INDEX], INDEX)
        with Recorder():
            distiller([torch.randn(BATCH, *STUDENT)], [torch.randn(BATCH, *TEACHER)], ALL[:, None], batch)
        assert largest <= 2000 * 64  # a bank; the vectors of all negatives would be three times that

    def test_brings_the_student_closer_to_its_own_memory_than_to_those_of_other_classes(self):
        distiller = CRD(setting(), negatives=12)
        contrast, index = distiller.contrasts[0], torch.arange(SAMPLES)
        student, teacher = torch.randn(SAMPLES, *STUDENT), torch.randn(SAMPLES, *TEACHER)
        batch = Batch(torch.zeros(SAMPLES, 3, 1, 1), LABELS, index)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)

        def margin() -> float:
            unit = F.normalize(contrast.embed_student(student), dim=1)
            similarity = unit @ contrast.teacher_bank.rows.T
            return (similarity.diagonal().mean() - similarity[LABELS[:, None] != LABELS].mean()).item()

        before = margin()
        for _ in range(100):
            optimizer.zero_grad()
            distiller([student], [teacher], torch.ones(SAMPLES, 1), batch).sum().backward()
            optimizer.step()
        assert margin() > before + 0.2
