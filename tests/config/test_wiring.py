"""What one real step moves and what it must leave alone, for every distiller and selection, and for unequal depths."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import toys
from torch import Tensor, nn
from toys import NUM_SAMPLES, toy_batch, toy_task

from datasets.batch import Batch
from distillers.spot_adaptive.selection import SELECTIONS
from distillers.task import Pretraining, Task, TaskOutput
from models import get_model
from utils.config import Config, find_config
from utils.errors import UserError
from utils.training.build import assemble
from utils.training.optim import make_optimizers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WITH_SPOTS = ["at", "fitnet", "sp", "rkd", "cc", "vid", "pkt", "ft", "fsp", "nst", "crd", "reviewkd"]
OF_ANY_WIDTHS = ["kd", *(name for name in WITH_SPOTS if name != "fsp")]
DISTILLERS = ["kd", "dkd", "dist", "nkd", "wttm", *WITH_SPOTS]
# (teacher, student), tried in turn; their features are 6 and 5, 6 and 5, 5 and 6
UNEQUAL_PAIRS = [("vgg13", "ShuffleNetV1"), ("ResNet50", "ShuffleNetV2"), ("resnet32x4", "MobileNetV2")]

every_distiller = pytest.mark.parametrize("distiller", DISTILLERS)
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


def config_without_decay() -> Config:
    """With weight decay, a step would move even what no gradient reaches."""
    return Config.from_dict(
        {
            "dataset": {"name": "digits"},
            "training": {"optimizer": {"weight_decay_stage2": 0, "weight_decay_agent": 0}},
            "kd": {"teacher": {"name": "resnet8"}, "student": {"name": "resnet8"}},
            "kd_loss": {"name": "at"},
            "pretrain": {"optimizer": {"weight_decay": 0}},
        }
    )


def take_step(task: Task, batch: Batch, config: Config) -> TaskOutput:
    """One step of training with the optimisers of a real run."""
    optimizers = make_optimizers(task.parameter_groups(), config)
    task.train()
    output = toys.take_step(task, batch)
    for scheduled in optimizers.values():
        scheduled.optimizer.step()
    return output


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, also those that no checkpoint has."""
    return dict(itertools.chain(module.named_parameters(), module.named_buffers()))


def snapshot(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors(module).items()}


def moved(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are no longer what they were, bit for bit."""
    return {name for name, tensor in tensors(module).items() if not torch.equal(tensor, before[name])}


def without_effect(module: nn.Module) -> set[str]:
    """Biases just before a BatchNorm, which subtracts them again: rounding alone decides whether they move."""
    return {
        f"{name}.{position}.bias"
        for name, sequence in module.named_modules()
        if isinstance(sequence, nn.Sequential)
        for position, (layer, after) in enumerate(itertools.pairwise(sequence))
        if isinstance(after, nn.BatchNorm2d) and layer.bias is not None
    }


def assert_finite(task: Task, output: TaskOutput) -> None:
    assert output.loss.isfinite()
    assert all(part.isfinite() for part in output.parts.values())
    assert all(tensor.isfinite().all() for tensor in tensors(task).values())


class TestOneStep:
    """On the whole toy set: with as many samples, some take every one of the ways through the routed networks."""

    @every_distiller
    @every_selection
    def test_moves_all_that_is_trained_and_nothing_else(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        before = snapshot(task)
        output = take_step(task, toy_batch(NUM_SAMPLES), config_without_decay())
        assert_finite(task, output)
        # The sampler is the table of the classes that CRD draws from.
        fixed = ("teacher.", "distiller.paraphrasers.", "distiller.sampler.", "alpha_ramp.", "beta_ramp.", "epoch")
        fixed += ("distiller.teacher.",) * (distiller == "cc")  # the embedding that is its target
        expected = {name for name in before if not name.startswith(fixed)}
        unsure = without_effect(task)
        assert moved(task, before) - unsure == expected - unsure
        has_policy = any(name.startswith(("policy.", "router.")) for name in expected)
        assert has_policy == SELECTIONS[selection].policy

    @pytest.mark.parametrize("distiller", ["at", "crd"])
    @pytest.mark.parametrize("selection", ["adaptive", "anti"])
    def test_leaves_the_twin_the_students_own_tensors_frozen_and_evaluating(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        take_step(task, toy_batch(NUM_SAMPLES), config_without_decay())
        twin, student = task._twin[0], tensors(task.student)
        assert {name: t.data_ptr() for name, t in tensors(twin).items()} == {
            name: t.data_ptr() for name, t in student.items()
        }
        assert not any(parameter.requires_grad for parameter in twin.parameters())
        assert not any(module.training for module in (*twin.modules(), *task.teacher.modules()))

    @every_selection
    def test_moves_the_memories_of_the_chosen_samples_alone(self, selection):
        task = toy_task("crd", selection=selection)
        before, batch = snapshot(task), toy_batch(NUM_SAMPLES)
        output = take_step(task, batch, config_without_decay())
        chosen = batch.index[output.gates[:, 0] > 0]
        for side in ("student", "teacher"):
            name = f"distiller.contrasts.0.{side}_bank.rows"
            rows = (tensors(task)[name] != before[name]).any(dim=1).nonzero()[:, 0]
            assert rows.tolist() == chosen.sort().values.tolist()

    @every_distiller
    @every_selection
    def test_of_a_single_image_stays_finite(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        for seed in range(4):  # gates open and closed
            assert_finite(task, take_step(task, toy_batch(1, seed=seed), config_without_decay()))


@pytest.mark.parametrize(("distiller", "trained"), [("ft", "distiller.paraphrasers."), ("fsp", "student.")])
def test_a_step_of_pretraining_moves_its_own_alone(distiller, trained):
    task = toy_task(distiller)
    pretraining = Pretraining(task.student, task.teacher, task.distiller)
    before = snapshot(task)
    output = take_step(pretraining, toy_batch(NUM_SAMPLES), config_without_decay())
    assert_finite(pretraining, output)
    expected = {name for name in before if name.startswith(trained)}
    expected -= {"student.fc.weight", "student.fc.bias"}  # the classifier comes after the last flow
    assert moved(task, before) == expected


class TestNothingChosen:
    @pytest.fixture
    @staticmethod
    def close(monkeypatch):
        """Make a selection close all gates."""

        def change(name: str) -> str:
            monkeypatch.setitem(SELECTIONS, name, SELECTIONS[name]._replace(choose=torch.zeros_like))
            return name

        return change

    @every_distiller
    @every_selection
    def test_leaves_the_student_its_cross_entropy_and_the_distiller_no_gradient(self, close, distiller, selection):
        task, batch = toy_task(distiller, selection=close(selection), beta=1000.0), toy_batch()
        alone = copy.deepcopy(task.student)
        output = toys.take_step(task, batch)
        assert_finite(task, output)
        F.cross_entropy(alone(batch.image), batch.label).backward()
        for parameter, expected in zip(task.student.parameters(), alone.parameters()):
            assert torch.equal(parameter.grad, expected.grad)
        assert not any(parameter.grad is not None and parameter.grad.any() for parameter in task.distiller.parameters())

    def test_leaves_the_memories_as_they_are(self, close):
        task = toy_task("crd", selection=close("fixed"))
        before = snapshot(task)
        toys.take_step(task, toy_batch())
        assert not any(name.startswith("distiller.") for name in moved(task, before))


@functools.cache
def network(name: str) -> nn.Module:
    """Built once: the pairs below share them, and train copies."""
    return get_model(name, num_classes=100)


def tiny_batch() -> Batch:
    """Two random images for the task of `assemble_pair`."""
    return Batch(torch.randn(2, 3, 32, 32), torch.tensor([3, 5]), torch.tensor([3, 105]))


def assemble_pair(distiller: str, teacher: str, student: str, *overrides: str):
    """The config that the launchers compose for a pair, and its task on a CIFAR-100 of 400 images."""
    names = {"teacher": teacher, "student": student, "distiller": distiller}
    config = find_config("cifar-100", 1029, **names, root=CONFIGS).load(overrides)
    data = SimpleNamespace(image_size=(32, 32), labels=torch.arange(400) % 100)
    trained = copy.deepcopy(network(student)).requires_grad_()  # as a teacher elsewhere, it was frozen
    return config, assemble(config, trained, network(teacher), data)


class TestUnequalDepth:
    @pytest.mark.parametrize(("distiller", "pair"), [*zip(OF_ANY_WIDTHS, itertools.cycle(UNEQUAL_PAIRS))])
    def test_trains_with_every_distiller(self, distiller, pair):
        teacher, student = pair
        config, task = assemble_pair(distiller, teacher, student)
        before = snapshot(task.student)
        assert_finite(task, take_step(task, tiny_batch(), config))
        assert moved(task.student, before) == set(before)

    def test_fsp_says_which_pair_and_spot_do_not_fit(self):
        with pytest.raises(UserError) as error:
            assemble_pair("fsp", "vgg13", "ShuffleNetV1")
        widths = "student 24→240 channels, teacher 64→128"
        assert str(error.value).startswith(f"fsp: vgg13-ShuffleNetV1, spot 1: {widths}; ")

    @pytest.mark.parametrize("distiller", ["at", "crd"])
    def test_trains_with_another_loss_at_the_logits_as_the_config_says(self, distiller):
        words = ["kd_loss.logits=DKD", "kd_loss.logits_options={nontarget: 3}", "kd_loss.KD_T=2", "kd.warmup_epochs=9"]
        config, task = assemble_pair(distiller, "resnet20", "resnet8", *words)
        loss = task.logit_loss
        assert (type(loss).__name__, loss.temperature, loss.constants) == ("DKD", 2, {"nontarget": 3})
        assert (task.alpha_ramp.epochs, task.beta_ramp.epochs) == (9, 9)
        assert_finite(task, take_step(task, tiny_batch(), config))

    def test_fsp_trains_at_the_spots_where_the_channels_fit(self):
        # 64→128→256 channels in both, one feature later in the student
        config, task = assemble_pair("fsp", "vgg13", "resnet32x4", "kd_loss.spots=[[2, 1], [3, 2]]")
        assert task.distiller.spots == [(2, 1), (3, 2)]
        pretraining = Pretraining(task.student, task.teacher, task.distiller)
        assert_finite(task, take_step(pretraining, tiny_batch(), config))
        assert_finite(task, take_step(task, tiny_batch(), config))
