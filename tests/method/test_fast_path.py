"""Whole training steps against the same steps computed slowly from the formulas, see plain_formulas.

In float64, where two ways to one number agree to rounding and a wrong constant cannot hide behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from plain_formulas import Draws, PlainStep, Step
from torch import Tensor
from toys import take_step

from models import StagedModel, get_model
from utils.benchmark.cases import SEED, Conditions, Pair
from utils.config import find_config
from utils.training.build import assemble
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.precision import place_task
from utils.training.step import EagerStep, Phase

WITH_SPOTS = ("fitnet", "at", "sp", "cc", "vid", "rkd", "pkt", "ft", "fsp", "nst", "crd", "reviewkd")
DISTILLERS = (*WITH_SPOTS, "kd", "dkd", "dist", "nkd", "wttm")
LIKE = "resnet8-resnet8"  # of equal widths, which FSP needs
UNLIKE = "vgg8-resnet8"  # six features and five; adapters that halve and double
MOBILE = "resnet8-MobileNetV2_half"  # as before the other way round; depthwise convolutions; last maps 3:1 at size 24
WIDE = "vgg8-vgg8"  # far more channels than positions: NST and FSP go by positions
LOGITS = ("kl", "dkd", "dist", "nkd", "wttm")
SELECTIONS = ("adaptive", "anti", "shuffled", "fixed", "random")
BATCH, CLASSES, SAMPLES = 8, 10, 40

ONE_STEP = [(distiller, "fixed", LIKE, 8) for distiller in DISTILLERS]
OTHERS = ("adaptive", "anti", "shuffled", "random")
ONE_STEP += [(distiller, selection, LIKE, 8) for distiller in ("at", "crd") for selection in OTHERS]
ONE_STEP += [(distiller, "adaptive", UNLIKE, 8) for distiller in ("fitnet", "at", "vid", "nst", "crd", "reviewkd")]
ONE_STEP += [("sp", "adaptive", MOBILE, 24), ("ft", "adaptive", MOBILE, 24)]
ONE_STEP += [("nst", "adaptive", WIDE, 8), ("fsp", "adaptive", WIDE, 8)]
TWO_STEPS = [(distiller, "adaptive", LIKE, 8) for distiller in DISTILLERS]
TWO_STEPS += [("crd", "fixed", LIKE, 8), ("at", "adaptive", MOBILE, 24)]

TOLERANCE = 1e-9
# Some gradients are nothing but rounding, such as that of a bias before a BatchNorm. There is nothing in them to
# compare; this is how small they must be, relative to the largest gradient of all, in the fast and in the plain step.
NOTHING = 1e-12
# Of float32: its rounding, 6e-8, adds up to 1e-6 .. 1e-5 over the layers and the batch, whatever the distiller.
SINGLE_TOLERANCE, SINGLE_NOTHING = 3e-5, 1e-6


def every(selection: str, names: Sequence[str], one: str) -> list[tuple[str, str]]:
    """All names under one selection, and one of them under all selections."""
    return [*((name, selection) for name in names), *((one, other) for other in SELECTIONS if other != selection)]


@contextmanager
def in_double():
    """What the package makes from plain numbers is in float64, and what it lifts to "at least float32" stays there."""
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


@pytest.fixture
def double():
    with in_double():
        yield


@dataclass
class Taken:
    """What a step of the package gave, in the terms of the plain one; the loss to differentiate; and the draws."""

    step: Step
    loss: Tensor
    shares: dict[str, Tensor]
    draws: Draws


class Recorder:
    """Takes steps of a case and records what they draw and give."""

    def __init__(self, case: Case):
        self._case = case
        self._outputs, self._routed, self._gumbel, self._negatives, self._orders = [], [], [], [], []
        task = case.task
        self._forward, task.forward = task.forward, self._record_outputs
        if task.policy is not None:
            task.router.register_forward_hook(lambda module, inputs, output: self._routed.append(output.detach()))
            task.policy.register_forward_hook(lambda module, inputs, output: self._record_noise(output))
        if case.distiller == "crd":
            task.distiller.sampler.register_forward_hook(lambda module, inputs, out: self._negatives.append(out))

    def _record_outputs(self, batch):
        for output in self._forward(batch):
            self._outputs.append(output)
            yield output

    def _record_noise(self, logits: Tensor) -> None:
        """That of the gates, which are drawn as soon as the policy has given its logits, and the order after them."""
        state = torch.get_rng_state()
        self._gumbel.append(-torch.empty_like(logits).exponential_().log().double())
        self._orders.append(torch.empty_like(logits[..., 0]).uniform_().argsort(dim=0))
        torch.set_rng_state(state)

    def take(self, *, whole: bool) -> Taken:
        """One step, the optimisers included if `whole`."""
        for record in (self._outputs, self._routed, self._gumbel, self._negatives, self._orders):
            record.clear()
        if whole:
            self._case.step()
        else:
            take_step(self._case.task, self._case.batch)
        output, *_ = self._outputs
        parts = {name: part for output in self._outputs for name, part in output.parts.items()}
        labels = self._case.task.gate_labels
        names = {f"loss/{label}": f"spot {k}" for k, label in enumerate(labels[:-1])}
        names |= {f"weight/{label}": f"weight {k}" for k, label in enumerate(labels[:-1])}
        parts = {name: part for name, part in parts.items() if not name.startswith("ratio/")}
        losses = {names.get(name, name.removeprefix("loss/")): part for name, part in parts.items()}
        shares = {f"gate/{label}": losses.pop(f"gate/{label}") for label in labels}
        gradients = {name: p.grad.clone() for name, p in self._case.task.named_parameters() if p.grad is not None}
        step = Step(losses, gradients, output.gates == 1, *(self._routed or [None]))
        draws = Draws(
            *(self._gumbel or [None]),
            coins=output.gates,
            orders=self._orders[0] if self._orders else None,
            negatives=list(self._negatives),
        )
        return Taken(step, sum(output.loss.detach() for output in self._outputs), shares, draws)


class Case:
    """Training steps of one distiller under one selection, put together as a run would."""

    def __init__(self, pair: Pair, distiller: str, selection: str, teacher: StagedModel, conditions, overrides=()):
        self.distiller, self.selection, self.ramp = distiller, selection, 1.0
        keys = [f"kd.selection={selection}", f"dataset.num_classes={conditions.num_classes}", *overrides]
        names = {"teacher": pair.teacher, "student": pair.student, "distiller": distiller}
        self.config = find_config("cifar-100", SEED, **names).load(keys)
        torch.manual_seed(SEED)
        student, size = get_model(pair.student, conditions.num_classes), (conditions.size, conditions.size)
        info = SimpleNamespace(labels=conditions.labels(), image_size=size)
        self.task = place_task(assemble(self.config, student, teacher, info), self.config, conditions.device, size)
        self.task.train()
        self.batch = conditions.batch()
        phase = Phase("train", self.task, 1, make_optimizers(self.task.parameter_groups(), self.config))
        gates = GateRecorder(self.task.gate_labels, conditions.num_classes, conditions.samples, conditions.device)
        self._step = EagerStep(phase, Meter(conditions.device), gates, nullcontext)

    def step(self) -> None:
        self._step(self.batch)


def make_case(distiller: str, selection: str, pair: str, size: int, *options: str, seed: int = 0) -> Case:
    """A case whose networks have seen some images, so that their running statistics say something."""
    pair, conditions = Pair.parse(pair), Conditions(torch.device("cpu"), "fp32", BATCH, size, CLASSES, SAMPLES)
    torch.manual_seed(seed)  # not that of the student, or both would be the same network
    teacher = get_model(pair.teacher, CLASSES)
    # As if of two families, so that the gates start undecided.
    case = Case(pair, distiller, selection, teacher, conditions, ("kd_loss.homo=false", *options))
    torch.manual_seed(seed + 1)
    with torch.no_grad():
        for net in (case.task.student, teacher.train()):
            for _ in range(2):
                net(torch.randn(BATCH, 3, 8, 8) * 1.5 + 0.3)
    case.task.train()
    return case


def plain_steps(case: Case) -> PlainStep:
    """From where the case is now."""
    config = case.config
    kd, options = config.kd, config.kd_loss
    names = case.distiller, case.selection, kd.student.name
    return PlainStep(case.task, *names, options.spots, options.logits, options.standardize, kd.balance, case.ramp)


def deviations(found: dict[str, Tensor], expected: dict[str, Tensor], nothing: float = 0.0) -> dict[str, float]:
    """Largest difference of two tensors of one name, relative to the largest entry that is expected there.

    Args:
        found, expected: by name; one that is missing stands for zeros.
        nothing: where both are smaller than this share of the largest expected entry of all, they count as equal.
    """
    largest = max(value.abs().max().item() for value in expected.values())
    result = {}
    for name in found.keys() | expected.keys():
        a, b = found.get(name), expected.get(name)
        a = torch.zeros_like(b) if a is None else a.double()
        b = torch.zeros_like(a) if b is None else b.double()
        assert a.shape == b.shape, name
        if max(a.abs().max().item(), b.abs().max().item()) <= nothing * largest:
            continue
        result[name] = ((a - b).abs().max() / b.abs().max()).item() if not torch.equal(a, b) else 0.0
    return result


def compare(taken: Taken, plain: Step, case: Case, steps: PlainStep) -> dict[str, float]:
    """`deviations` of everything that a step gives and leaves behind: the parameters and statistics, too."""
    found = taken.step
    assert torch.equal(found.chosen, plain.chosen)
    assert found.losses.keys() == plain.losses.keys()
    assert (found.routed is None) == (plain.routed is None)
    shares = dict(zip(taken.shares, plain.chosen.double().mean(dim=0)))
    differentiated = plain.losses["total"] + plain.losses.get("policy", 0.0)
    result = deviations(found.losses | taken.shares, plain.losses | shares)
    result |= deviations({"loss": taken.loss}, {"loss": differentiated})
    result |= {f"{name}.grad": x for name, x in deviations(found.gradients, plain.gradients, NOTHING).items()}
    result |= deviations(case.task.state_dict(), steps.copy.state_dict(), NOTHING)
    if plain.routed is not None:
        result |= deviations({"routed logits": found.routed}, {"routed logits": plain.routed.detach()})
    return result


def assert_agree(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    # Not "more than", which NaN is not.
    wrong = {name: deviation for name, deviation in found.items() if not deviation <= tolerance}
    assert not wrong


def takes_every_route(step: Step) -> bool:
    """Every gate is both open and closed, and every adapter on the way of some sample to its logits."""
    chosen = step.chosen.sum(dim=0)
    largest = max(gradient.abs().max() for gradient in step.gradients.values())
    adapters = [
        gradient.abs().max() > NOTHING * largest
        for name, gradient in step.gradients.items()
        if name.startswith("router.") and name.endswith(".weight")
    ]
    return bool(((chosen > 0) & (chosen < BATCH)).all()) and all(adapters)


def first_step(make: Callable[[], Case], fits: Callable[[Step], bool], *, whole: bool = False):
    """The same first step of a case and of its plain form, with draws that show what is to be seen.

    Args:
        make: the case.
        fits: whether the draws do, from what the plain step gives.
        whole: let the case's optimisers take their step.

    Returns:
        the case and its recorder, what the step gave, the plain steps and what theirs gave.
    """
    for seed in range(10):
        case = make()
        recorder, plain = Recorder(case), plain_steps(case)
        torch.manual_seed(seed)
        taken = recorder.take(whole=whole)
        expected = plain(case.batch, taken.draws)
        if fits(expected):
            return case, recorder, taken, plain, expected
    raise AssertionError("no draws that fit")


@pytest.mark.usefixtures("double")
class TestOneStep:
    @pytest.mark.parametrize(("distiller", "selection", "pair", "size"), ONE_STEP)
    def test_gives_the_losses_gradients_statistics_and_banks_of_the_formulas(self, distiller, selection, pair, size):
        routed = selection in ("adaptive", "anti", "shuffled")
        case, _, taken, plain, expected = first_step(
            lambda: make_case(distiller, selection, pair, size), lambda step: not routed or takes_every_route(step)
        )
        assert taken.step.gradients.keys() == expected.gradients.keys()
        assert_agree(compare(taken, expected, case, plain))

    def test_is_that_of_the_formulas_at_spots_of_unequal_indices(self):
        # Maps and pooled vectors; from one spot to the next the networks run a different number of stages.
        spots = "kd_loss.spots=[[0, 1], [1, 3], [4, 5]]"
        case, _, taken, plain, expected = first_step(
            lambda: make_case("sp", "adaptive", UNLIKE, 8, spots), takes_every_route
        )
        assert_agree(compare(taken, expected, case, plain))

    @pytest.mark.parametrize(("distiller", "selection"), every("adaptive", WITH_SPOTS, "at"))
    def test_is_that_of_the_formulas_with_balanced_spots(self, distiller, selection):
        # Weights at 1 and below it, and a β that is not that of the config: the ratio is that of the β in use.
        options = ("kd.balance=0.01", "kd.warmup_epochs=4")

        def make() -> Case:
            case = make_case(distiller, selection, LIKE, 8, *options)
            case.task.start_epoch(2)
            case.ramp = 3 / 4
            return case

        case, _, taken, plain, expected = first_step(make, lambda step: step.chosen.any(dim=0).all())
        assert_agree(compare(taken, expected, case, plain))

    @pytest.mark.parametrize(("logits", "selection"), every("adaptive", LOGITS, "nkd"))
    def test_is_that_of_the_formulas_with_another_loss_of_standardised_logits(self, logits, selection):
        options = (f"kd_loss.logits={logits}", "kd_loss.standardize=true")
        case, _, taken, plain, expected = first_step(
            lambda: make_case("fitnet", selection, LIKE, 8, *options), lambda step: True
        )
        assert_agree(compare(taken, expected, case, plain))

    @pytest.mark.parametrize("distiller", WITH_SPOTS)
    def test_is_that_of_the_formulas_where_no_spot_has_a_chosen_sample(self, distiller):
        def make() -> Case:
            case = make_case(distiller, "adaptive", LIKE, 8)
            with torch.no_grad():  # away from the teacher's route at all gates but the logits'
                case.task.policy.linear.bias.view(-1, 2)[:-1, 0] -= 20
            return case

        case, _, taken, plain, expected = first_step(
            make, lambda step: not step.chosen[:, :-1].any() and bool(step.chosen[:, -1].any())
        )
        # What a distiller owns has no gradient in the formulas and one of zeros in a step of static shape.
        assert_agree(compare(taken, expected, case, plain))

    @pytest.mark.parametrize("missing", [True, False], ids=["few through the teacher", "enough through the teacher"])
    @pytest.mark.parametrize("worse", [True, False], ids=["routed worse", "routed better"])
    def test_weighs_the_routed_loss_and_asks_for_half_the_batch_as_the_formulas_do(self, worse, missing):
        def make() -> Case:
            case = make_case("rkd", "adaptive", LIKE, 8)  # γ is 2
            # A network that is sure of itself without having learned anything is wrong at a high price.
            network = case.task.teacher if worse else case.task.student
            with torch.no_grad():
                for parameter in list(network.parameters())[-2:]:
                    parameter *= 100
            return case

        def fits(step: Step) -> bool:
            through_teacher = step.chosen[:, -1].sum()
            is_worse = step.losses["routed_ce"] > step.losses["ce"]
            return 0 < through_teacher < BATCH and (through_teacher < BATCH / 2) == missing and is_worse == worse

        case, _, taken, plain, expected = first_step(make, fits)
        assert_agree(compare(taken, expected, case, plain))

    @pytest.mark.parametrize("distiller", ["ft", "crd", "kd"])
    def test_leaves_what_is_not_trained_without_a_gradient(self, distiller):
        case = make_case(distiller, "adaptive", LIKE, 8)
        take_step(case.task, case.batch)
        task = case.task
        trained = {id(parameter) for group in task.parameter_groups().values() for parameter in group}
        with_gradient = {id(parameter) for parameter in task.parameters() if parameter.grad is not None}
        assert with_gradient == trained
        frozen = [task.teacher, task._twin[0], *([task.distiller.paraphrasers] if distiller == "ft" else [])]
        assert not any(id(parameter) in trained for module in frozen for parameter in module.parameters())
        assert not any(parameter.grad is not None for module in frozen for parameter in module.parameters())


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("distiller", "selection", "pair", "size"), TWO_STEPS)
def test_two_steps_with_both_optimisers_lead_where_the_formulas_lead(distiller, selection, pair, size):
    case, recorder, taken, plain, expected = first_step(
        lambda: make_case(distiller, selection, pair, size),
        lambda step: selection == "fixed" or takes_every_route(step),
        whole=True,
    )
    plain.optimise(expected.gradients)
    assert_agree(compare(taken, expected, case, plain))
    taken = recorder.take(whole=True)
    expected = plain(case.batch, taken.draws)
    plain.optimise(expected.gradients)
    assert_agree(compare(taken, expected, case, plain))


@pytest.mark.parametrize("distiller", DISTILLERS)
def test_a_step_in_float32_has_the_gradients_of_the_formulas_in_float64(distiller):
    # Where the input of a ReLU is nothing but rounding, it may open in the one and stay closed in the other. That
    # shows as a deviation of 1e-2 in some tensor, for one draw in dozens, and is no error. An error shows every time.
    for seed in range(3):
        case = make_case(distiller, "adaptive", LIKE, 16, seed=seed)
        with in_double():
            plain = plain_steps(case)
        taken = Recorder(case).take(whole=False)
        with in_double():
            expected = plain(case.batch._replace(image=case.batch.image.double()), taken.draws)
        assert all(gradient.dtype == torch.float32 for gradient in taken.step.gradients.values())
        assert torch.equal(taken.step.chosen, expected.chosen)
        found = deviations(taken.step.gradients, expected.gradients, SINGLE_NOTHING)
        if all(deviation <= SINGLE_TOLERANCE for deviation in found.values()):
            return
    assert_agree(found, SINGLE_TOLERANCE)
