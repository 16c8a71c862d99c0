"""Whole training steps against the same steps computed slowly from the formulas, see plain_formulas.

In float64, where two ways to one number agree to rounding and a wrong constant cannot hide behind it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from plain_formulas import Draws, PlainStep, Step
from torch import Tensor, nn

from datasets.batch import Batch
from models import get_model
from models.staged import StagedModel, global_pool
from utils.config import find_config
from utils.training.build import assemble
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.precision import place_task
from utils.training.step import EagerStep, Phase

BATCH, CLASSES, SAMPLES = 8, 10, 40
CPU = torch.device("cpu")
TOLERANCE = 1e-9
# Some gradients are nothing but rounding, such as that of a bias before a BatchNorm. There is nothing in them to
# compare; this is how small they must be, relative to the largest gradient of all, in the fast and in the plain step.
NOTHING = 1e-12
# Of float32: its rounding, 6e-8, adds up to 1e-6 .. 1e-5 over the layers and the batch, whatever the distiller.
SINGLE_TOLERANCE, SINGLE_NOTHING = 3e-5, 1e-6


class Tower(StagedModel):
    """A convolution, BatchNorm and ReLU in every stage."""

    def __init__(self, widths: tuple[int, ...], strides: tuple[int, ...]):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(before, width, 3, stride, padding=1, bias=False), nn.BatchNorm2d(width))
            for before, width, stride in zip((3, *widths), widths, strides)
        )
        self.fc = nn.Linear(widths[-1], CLASSES)

    def stages(self):
        return (*((block, F.relu) for block in self.blocks), (global_pool,), (self.fc,))


# Teacher, student, size of the images.
SMALL = (4, 4, 6, 8), (1, 1, 2, 2)
NETWORKS = {
    "alike": (SMALL, SMALL, 8),  # of equal widths, which FSP needs
    "unlike": (((6, 8, 10, 12, 12), (1, 2, 2, 2, 1)), SMALL, 8),  # six features and five; adapters halve and double
    "wide": (2 * (((16, 16, 32, 64), (1, 2, 2, 2)),) + (8,)),  # more channels than positions: NST, FSP by positions
    "real": ("resnet8", "MobileNetV2_half", 12),  # depthwise convolutions, other ratios of sizes, another learning rate
}
# Two steps: the second one has the momentum of both optimisers, and the banks and statistics that the first one left.
TWICE = {("at", "adaptive", "alike"), ("crd", "adaptive", "unlike"), ("reviewkd", "adaptive", "unlike")}
BALANCED = ("kd.balance=0.01", "kd.warmup_epochs=4")  # weights at 1 and below it, and a β in its third epoch of four
CASES = [
    *(("at", selection, "alike") for selection in ("adaptive", "anti", "shuffled", "fixed", "random")),
    *(("crd", selection, "alike") for selection in ("anti", "shuffled", "fixed", "random")),
    ("ft", "adaptive", "alike"),
    *((name, "fixed", "alike") for name in ("fsp", "nkd", "dkd", "rkd", "vid")),
    ("dist", "anti", "alike"),
    ("wttm", "shuffled", "alike"),
    *((name, "adaptive", "unlike") for name in ("fitnet", "at", "sp", "vid", "nst", "crd", "reviewkd")),
    *((name, "adaptive", "unlike") for name in ("cc", "rkd", "pkt", "kd")),
    *((name, "adaptive", "wide") for name in ("nst", "fsp")),
    ("at", "adaptive", "real"),
    # Maps and pooled vectors; from one spot to the next the networks run a different number of stages.
    ("sp", "adaptive", "unlike", "kd_loss.spots=[[0, 1], [1, 3], [4, 5]]"),
    ("at", "adaptive", "alike", *BALANCED),
    ("crd", "shuffled", "alike", *BALANCED),
    ("fsp", "fixed", "alike", *BALANCED),
    ("reviewkd", "anti", "unlike", *BALANCED),
    ("rkd", "random", "alike", *BALANCED),
    *(
        ("fitnet", selection, "alike", f"kd_loss.logits={logits}", "kd_loss.standardize=true")
        for logits, selection in zip(
            ("kl", "dkd", "dist", "nkd", "wttm"), ("adaptive", "anti", "fixed", "random", "adaptive")
        )
    ),
]


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


def network(what) -> StagedModel:
    return get_model(what, CLASSES) if isinstance(what, str) else Tower(*what)


class Case:
    """Training steps of one distiller under one selection, put together as a run would; the networks have seen some
    images, so that their running statistics say something."""

    def __init__(self, distiller: str, selection: str, networks: str, *keys: str, seed: int = 0):
        teacher, student, size = NETWORKS[networks]
        names = {"teacher": "resnet8", "student": student if isinstance(student, str) else "resnet8"}
        # As if of two families, so that the gates start undecided.
        how = [f"kd.selection={selection}", f"dataset.num_classes={CLASSES}", "kd_loss.homo=false", *keys]
        self.config = find_config("cifar-100", 1029, **names, distiller=distiller).load(how)
        torch.manual_seed(seed)
        teacher, student = network(teacher), network(student)
        with torch.no_grad():
            for net in (student.train(), teacher.train(), student, teacher):
                net(torch.randn(BATCH, 3, 8, 8) * 1.5 + 0.3)
        labels = torch.arange(SAMPLES) % CLASSES
        info = SimpleNamespace(labels=labels, image_size=(size, size))
        self.task = place_task(assemble(self.config, student, teacher, info), self.config, CPU, (size, size)).train()
        if self.config.kd.warmup_epochs:
            self.task.start_epoch(2)
        index = torch.randperm(SAMPLES)[:BATCH]
        self.batch = Batch(torch.randn(BATCH, 3, size, size), labels[index], index)
        phase = Phase("train", self.task, 1, make_optimizers(self.task.parameter_groups(), self.config))
        gates = GateRecorder(self.task.gate_labels, CLASSES, SAMPLES, CPU)
        self._step = EagerStep(phase, Meter(CPU), gates, nullcontext())
        self._record()

    def _record(self) -> None:
        """Let `_outputs` and `_draws` have what a step gives and draws."""
        task = self.task
        forward, task.forward = task.forward, lambda batch: map(self._keep, forward(batch))
        if task.policy is not None:
            task.router.register_forward_hook(lambda module, inputs, output: setattr(self, "_routed", output.detach()))
            task.policy.register_forward_hook(lambda module, inputs, output: self._keep_noise(output))
        if hasattr(task.distiller, "sampler"):
            task.distiller.sampler.register_forward_hook(lambda module, inputs, out: self._draws.negatives.append(out))

    def _keep(self, output):
        self._outputs.append(output)
        return output

    def _keep_noise(self, logits: Tensor) -> None:
        """That of the gates, which are drawn as soon as the policy has given its logits, and the order after them."""
        state = torch.get_rng_state()
        self._draws.gumbel = -torch.empty_like(logits).exponential_().log().double()
        self._draws.orders = torch.empty_like(logits[..., 0]).uniform_().argsort(dim=0)
        torch.set_rng_state(state)

    def step(self) -> tuple[Step, Draws]:
        """One step of the package, the optimisers included, in the terms of the plain one; and what it drew."""
        self._outputs, self._routed, self._draws = [], None, Draws()
        self._step(self.batch)
        gates = self._draws.coins = self._outputs[0].gates
        losses = {name: part for output in self._outputs for name, part in output.parts.items()}
        losses = {name: part for name, part in losses.items() if not name.startswith("ratio/")}
        losses["differentiated"] = sum(output.loss.detach() for output in self._outputs)
        gradients = {name: p.grad.clone() for name, p in self.task.named_parameters() if p.grad is not None}
        return Step(losses, gradients, gates == 1, self._routed), self._draws


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
        if max(a.abs().max().item(), b.abs().max().item()) > nothing * largest and not torch.equal(a, b):
            result[name] = ((a - b).abs().max() / b.abs().max()).item()
    return result


def assert_small(found: dict[str, float], tolerance: float = TOLERANCE) -> None:
    # Not "more than", which NaN is not.
    wrong = {name: deviation for name, deviation in found.items() if not deviation <= tolerance}
    assert not wrong


def assert_agree(found: Step, expected: Step, case: Case, plain: PlainStep) -> None:
    """Everything that a step gives and leaves behind: the parameters, statistics and banks, too."""
    assert torch.equal(found.chosen, expected.chosen)
    assert found.losses.keys() == expected.losses.keys()
    assert_small(deviations(found.losses, expected.losses, NOTHING))
    assert found.gradients.keys() == expected.gradients.keys()
    assert_small(deviations(found.gradients, expected.gradients, NOTHING))
    assert_small(deviations(case.task.state_dict(), plain.copy.state_dict(), NOTHING))
    assert (found.routed is None) == (expected.routed is None)
    if found.routed is not None:
        assert all(parameter.grad is None for parameter in case.task._twin[0].parameters())
        assert_small(deviations({"routed": found.routed}, {"routed": expected.routed.detach()}))


def takes_every_route(step: Step) -> bool:
    """Every gate is both open and closed, and every adapter on the way of some sample to its logits; without a policy,
    some gate is open at every spot."""
    chosen = step.chosen.sum(dim=0)
    if step.routed is None:
        return bool(chosen.all())
    largest = max(gradient.abs().max() for gradient in step.gradients.values())
    adapters = [
        gradient.abs().max() > NOTHING * largest
        for name, gradient in step.gradients.items()
        if name.startswith("router.") and name.endswith(".weight")
    ]
    return bool(((chosen > 0) & (chosen < BATCH)).all()) and all(adapters)


def check_step(make: Callable[[], Case], fits: Callable[[Step], bool] = takes_every_route, steps: int = 1) -> None:
    """Compare steps of a case with their plain form; the first one has draws that show what is to be seen.

    Args:
        make: the case.
        fits: whether the draws do, from what the plain step gives.
    """
    for seed in range(10):
        case = make()
        plain = PlainStep(case.task, case.config)
        torch.manual_seed(seed)
        found, draws = case.step()
        expected = plain(case.batch, draws)
        if fits(expected):
            break
    else:
        raise AssertionError("no draws that fit")
    for _ in range(steps - 1):
        plain.optimise(expected.gradients)
        assert_agree(found, expected, case, plain)
        found, draws = case.step()
        expected = plain(case.batch, draws)
    if not expected.chosen[:, :-1].any():
        # What a distiller owns has no gradient in the formulas, and one of zeros in a step of static shape.
        expected.gradients |= {name: 0 * g for name, g in found.gradients.items() if name not in expected.gradients}
    plain.optimise(expected.gradients)
    assert_agree(found, expected, case, plain)


@pytest.mark.usefixtures("double")
class TestStep:
    @pytest.mark.parametrize("what", CASES, ids="-".join)
    def test_gives_and_leaves_what_the_formulas_do(self, what):
        check_step(lambda: Case(*what), steps=1 + (what in TWICE))

    @pytest.mark.parametrize("distiller", ["vid", "crd"])
    def test_is_that_of_the_formulas_where_no_spot_has_a_chosen_sample(self, distiller):
        def make() -> Case:
            case = Case(distiller, "adaptive", "alike")
            with torch.no_grad():  # away from the teacher's route at all gates but the logits'
                case.task.policy.linear.bias.view(-1, 2)[:-1, 0] -= 20
            return case

        check_step(make, lambda step: not step.chosen[:, :-1].any() and bool(step.chosen[:, -1].any()))

    def test_leaves_a_gradient_in_all_that_is_trained_and_in_nothing_else(self):
        case = Case("ft", "adaptive", "alike")
        case.step()
        task = case.task
        trained = {id(parameter) for group in task.parameter_groups().values() for parameter in group}
        assert {id(parameter) for parameter in task.parameters() if parameter.grad is not None} == trained


def test_the_loss_at_the_logits_is_that_of_the_config():
    keys = ["kd_loss.logits=DKD", "kd_loss.logits_options={nontarget: 3}", "kd_loss.KD_T=2", "kd.warmup_epochs=9"]
    task = Case("at", "adaptive", "alike", *keys).task
    loss = task.logit_loss
    assert (type(loss).__name__, loss.temperature, loss.constants) == ("DKD", 2, {"nontarget": 3})
    assert (task.alpha_epochs, task.beta_epochs) == (9, 9)


@pytest.mark.parametrize("distiller", ["at", "crd", "pkt", "reviewkd"])
def test_a_step_in_float32_has_the_gradients_of_the_formulas_in_float64(distiller):
    # Where the input of a ReLU is nothing but rounding, it may open in the one and stay closed in the other. That
    # shows as a deviation of 1e-2 in some tensor, for one draw in dozens, and is no error. An error shows every time.
    for seed in range(3):
        case = Case(distiller, "adaptive", "alike", seed=seed)
        with in_double():
            plain = PlainStep(case.task, case.config)
        found, draws = case.step()
        with in_double():
            expected = plain(case.batch._replace(image=case.batch.image.double()), draws)
        assert all(gradient.dtype == torch.float32 for gradient in found.gradients.values())
        assert torch.equal(found.chosen, expected.chosen)
        deviating = deviations(found.gradients, expected.gradients, SINGLE_NOTHING)
        if all(deviation <= SINGLE_TOLERANCE for deviation in deviating.values()):
            return
    assert_small(deviating, SINGLE_TOLERANCE)
