"""Smoothed labels, mixed images, and what a distillation makes of them."""

import pytest
import torch
import torch.nn.functional as F
from toys import NUM_CLASSES, take_step, toy_batch, toy_task

from distillers.label_loss import LabelLoss, Targets
from distillers.spot_adaptive import distillation

BATCH = toy_batch(6)
BEFORE = BATCH.image.roll(1, 0)  # what each image is mixed with


def probabilities(targets):
    """What each image is to be taken for, ``[B, num_classes]``."""
    own = F.one_hot(targets.label, NUM_CLASSES).float()
    return own if targets.other is None else own.lerp(F.one_hot(targets.other, NUM_CLASSES).float(), 1 - targets.share)


def test_all_is_off_by_default_and_draws_no_random_numbers():
    state = torch.get_rng_state()
    loss = LabelLoss()
    batch, targets = loss.mix(BATCH)
    assert batch is BATCH
    logits = torch.randn(6, NUM_CLASSES, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loss(logits, targets), F.cross_entropy(logits, BATCH.label))
    assert torch.equal(torch.get_rng_state(), state)
    assert loss.state_dict() == {}


def test_classes_may_weigh_differently():
    weights = torch.arange(1.0, NUM_CLASSES + 1)
    logits = torch.randn(6, NUM_CLASSES, dtype=torch.float64)
    own = -logits.log_softmax(1)[torch.arange(6), BATCH.label]
    share = weights[BATCH.label].double()
    found = LabelLoss(class_weights=weights.double())(logits, Targets(BATCH.label))
    torch.testing.assert_close(found, (own * share).sum() / share.sum())


@pytest.mark.parametrize("options", [{}, {"mixup": 0.4}, {"cutmix": 1.0}])
def test_the_loss_is_cross_entropy_with_probabilities(options):
    torch.manual_seed(3)
    loss = LabelLoss(smoothing=0.1, **options)
    _, targets = loss.mix(BATCH)
    logits = torch.randn(6, NUM_CLASSES, requires_grad=True)
    found = loss(logits, targets)
    expected = F.cross_entropy(logits, probabilities(targets), label_smoothing=0.1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(expected, logits))


def test_mixup_adds_each_image_and_the_one_before_it():
    batch, targets = LabelLoss(mixup=0.4).mix(BATCH)
    assert 0 < targets.share < 1
    torch.testing.assert_close(batch.image, targets.share * BATCH.image + (1 - targets.share) * BEFORE)
    assert torch.equal(targets.other, BATCH.label.roll(1))
    assert torch.equal(batch.label, BATCH.label)
    assert torch.equal(batch.index, BATCH.index)


def test_cutmix_puts_a_rectangle_of_the_image_before_into_each():
    loss, sizes = LabelLoss(cutmix=1.0), []
    for _ in range(200):
        batch, targets = loss.mix(BATCH)
        foreign = (batch.image != BATCH.image).any(1)
        assert torch.equal(batch.image, torch.where(foreign[:, None], BEFORE, BATCH.image))
        assert torch.equal(foreign, foreign[:1].expand_as(foreign))
        rows, columns = foreign[0].any(1), foreign[0].any(0)
        assert torch.equal(foreign[0], rows[:, None] & columns)
        assert targets.share.item() == pytest.approx(1 - foreign[0].float().mean().item())
        sizes.append(1 - targets.share.item())
    # A uniform part of the area, less what is beyond the edges.
    assert 0.25 < sum(sizes) / len(sizes) < 0.45


def test_the_share_has_the_beta_distribution():
    torch.manual_seed(0)
    loss = LabelLoss(mixup=0.5)
    shares = torch.stack([loss.mix(BATCH)[1].share for _ in range(2000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.03)
    assert shares.var().item() == pytest.approx(1 / 8, rel=0.05)


def test_with_both_each_step_is_one_or_the_other():
    torch.manual_seed(0)
    loss, own = LabelLoss(mixup=1.0, cutmix=1.0), []
    for _ in range(200):
        image = loss.mix(BATCH)[0].image
        own.append(((image == BATCH.image) | (image == BEFORE)).all().item())
    assert 70 < sum(own) < 130


def test_nothing_is_mixed_in_evaluation():
    assert LabelLoss(mixup=1.0).eval().mix(BATCH)[0] is BATCH


def test_the_dominant_class_has_the_larger_share():
    for share, expected in ((0.5, [1, 2]), (0.4, [3, 0])):
        assert Targets(torch.tensor([1, 2]), torch.tensor([3, 0]), torch.tensor(share)).dominant.tolist() == expected


def keep_call(calls, name, module, method):
    """Let `calls` have the arguments and the result of ``module.method``."""
    original = getattr(module, method)

    def call(*arguments):
        result = original(*arguments)
        calls[name] = arguments, result
        return result

    setattr(module, method, call)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_both_networks_see_the_mixed_images_and_both_losses_have_the_same_targets(share, monkeypatch):
    task = toy_task("at", gamma=2.0, routing_share=share, label_loss=LabelLoss(0.1, mixup=1.0))
    seen = {}
    keep_call(seen, "student", task.student, "features")
    keep_call(seen, "teacher", task.teacher, "features")
    keep_call(seen, "distiller", task.distiller, "forward")
    keep_call(seen, "router", task.router, "forward")
    keep_call(seen, "mixed", task.label_loss, "mix")
    monkeypatch.setattr(distillation, "routing_loss", distillation.routing_loss)  # is put back
    keep_call(seen, "loss", distillation, "routing_loss")
    monkeypatch.setattr(distillation, "world_size", lambda: 3)
    output = take_step(task, BATCH)

    _, (mixed, targets) = seen["mixed"]
    assert seen["student"][0][0] is seen["teacher"][0][0] is mixed.image
    count = round(share * 6)
    image, _, _, start, gates = seen["router"][0]
    features, _ = seen["teacher"][1]
    assert torch.equal(image, mixed.image[:count])
    assert torch.equal(start, features[task.router.spots[0].teacher][:count])
    assert torch.equal(gates, output.gates[:count])
    assert torch.equal(seen["distiller"][0][-1].label, BATCH.label)
    assert torch.equal(output.label, targets.dominant)

    def cross_entropy(logits):
        return F.cross_entropy(logits, probabilities(targets)[: len(logits)], label_smoothing=0.1)

    torch.testing.assert_close(output.parts["loss/ce"], cross_entropy(output.logits))
    student = sum(output.parts[f"loss/{name}"] for name in ("ce", "f1", "f2", "kl"))
    torch.testing.assert_close(output.parts["loss/total"], student)  # whatever the share
    routed = cross_entropy(seen["router"][1].detach())
    torch.testing.assert_close(output.parts["loss/routed_ce"], routed)
    # The quota of the last gate is that of the whole batch.
    arguments, expected = seen["loss"]
    own, chosen = cross_entropy(output.logits[:count]), output.gates[:, -1]
    torch.testing.assert_close(arguments, (routed, own, chosen, 2.0, 3))
    torch.testing.assert_close(output.parts["loss/policy"], expected.detach())
