"""What one real step moves and what it must leave alone; and that the files under configs/ train."""

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
from toys import NUM_SAMPLES, ToyNet, toy_batch, toy_task

from datasets.batch import Batch
from distillers.spot_adaptive.selection import SELECTIONS
from distillers.task import Classification, Pretraining, Task, TaskOutput
from models.staged import global_pool
from utils.config import Config, ModelConfig, find_config, load_config
from utils.errors import UserError
from utils.training.build import assemble, build_network
from utils.training.optim import make_optimizers

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WITH_SPOTS = ["at", "fitnet", "sp", "rkd", "cc", "vid", "pkt", "ft", "fsp", "nst", "crd", "reviewkd"]
DISTILLERS = ["kd", "dkd", "dist", "nkd", "wttm", *WITH_SPOTS]
CASES = [
    *((name, "adaptive") for name in DISTILLERS),
    *itertools.product(("at", "crd"), set(SELECTIONS) - {"adaptive"}),
]

each_case = pytest.mark.parametrize(("distiller", "selection"), sorted(CASES))
every_selection = pytest.mark.parametrize("selection", SELECTIONS)


@functools.cache
def config_without_decay() -> Config:
    """With weight decay, a step would move even what no gradient reaches."""
    no_decay = "training.optimizer={weight_decay_stage2: 0, weight_decay_agent: 0}"
    return composed("at", "resnet8", "resnet8", no_decay, "pretrain.optimizer.weight_decay=0")


def take_step(task: Task, batch: Batch, config: Config | None = None) -> TaskOutput:
    """One step of training with the optimisers of a real run, which stays finite."""
    optimizers = make_optimizers(task.parameter_groups(), config or config_without_decay())
    output = toys.take_step(task.train(), batch)
    for scheduled in optimizers.values():
        scheduled.optimizer.step()
    assert all(part.isfinite() for part in (output.loss, *output.parts.values()))
    assert all(tensor.isfinite().all() for tensor in tensors(task).values())
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


class TestOneStep:
    """On the whole toy set: with as many samples, some take every one of the ways through the routed networks."""

    @each_case
    def test_moves_all_that_is_trained_and_nothing_else(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        before = snapshot(task)
        take_step(task, toy_batch(NUM_SAMPLES))
        # The sampler is the table of the classes that CRD draws from.
        fixed = ("teacher.", "distiller.paraphrasers.", "distiller.sampler.", "ramp", "epoch")
        fixed += ("distiller.teacher.",) * (distiller == "cc")  # the embedding that is its target
        expected = {name for name in before if not name.startswith(fixed)}
        unsure = without_effect(task)
        assert moved(task, before) - unsure == expected - unsure
        has_policy = any(name.startswith(("policy.", "router.")) for name in expected)
        assert has_policy == SELECTIONS[selection].policy

    @pytest.mark.parametrize(("distiller", "selection"), [("at", "anti"), ("crd", "adaptive")])
    def test_leaves_the_twin_the_students_own_tensors_frozen_and_evaluating(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        take_step(task, toy_batch(NUM_SAMPLES))
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
        output = take_step(task, batch)
        chosen = batch.index[output.gates[:, 0] > 0]
        for side in ("student", "teacher"):
            name = f"distiller.contrasts.0.{side}_bank.rows"
            rows = (tensors(task)[name] != before[name]).any(dim=1).nonzero()[:, 0]
            assert rows.tolist() == chosen.sort().values.tolist()

    @each_case
    def test_of_two_images_the_fewest_that_there_are_stays_finite(self, distiller, selection):
        task = toy_task(distiller, selection=selection)
        for seed in range(2):
            take_step(task, toy_batch(2, seed=seed))


@pytest.mark.parametrize(("distiller", "trained"), [("ft", "distiller.paraphrasers."), ("fsp", "student.")])
def test_a_step_of_pretraining_moves_its_own_alone(distiller, trained):
    task = toy_task(distiller)
    before = snapshot(task)
    take_step(Pretraining(task.student, task.teacher, task.distiller), toy_batch(NUM_SAMPLES))
    expected = {name for name in before if name.startswith(trained)}
    expected -= {"student.fc.weight", "student.fc.bias"}  # the classifier comes after the last flow
    assert moved(task, before) == expected


@every_selection
def test_where_nothing_is_chosen_the_student_gets_its_cross_entropy_alone(monkeypatch, selection):
    monkeypatch.setitem(SELECTIONS, selection, SELECTIONS[selection]._replace(choose=torch.zeros_like))
    task, batch = toy_task("crd", selection=selection, beta=1000.0), toy_batch()
    alone, before = copy.deepcopy(task.student), snapshot(task)
    toys.take_step(task, batch)
    F.cross_entropy(alone(batch.image), batch.label).backward()
    for parameter, expected in zip(task.student.parameters(), alone.parameters()):
        assert torch.equal(parameter.grad, expected.grad)
    assert not any(parameter.grad is not None and parameter.grad.any() for parameter in task.distiller.parameters())
    assert not any(name.startswith("distiller.") for name in moved(task, before))


class DeepToy(ToyNet):
    """Wider, and with one map more."""

    def __init__(self):
        super().__init__(width=6)
        self.conv4, self.bn4 = nn.Conv2d(12, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.fc = nn.Linear(10, toys.NUM_CLASSES)

    def stages(self):
        return (*super().stages()[:3], (self.conv4, self.bn4, F.relu), (global_pool,), (self.fc,))


@pytest.mark.parametrize("distiller", ["kd", *(name for name in WITH_SPOTS if name != "fsp")])
def test_a_teacher_of_another_depth_and_width_serves_every_distiller(distiller):
    task = toy_task(distiller, teacher=DeepToy)
    before = snapshot(task.student)
    take_step(task, toy_batch())
    assert moved(task.student, before) == set(before)


@functools.cache
def network(name: str) -> nn.Module:
    """As a run builds it, once for all tests."""
    return build_network(ModelConfig(name=name), fake_data())


def fake_data() -> SimpleNamespace:
    """What building a task asks of `Data`."""
    return SimpleNamespace(num_classes=10, image_size=(16, 16), labels=torch.arange(40) % 10)


def make_task(config: Config) -> Task:
    student = copy.deepcopy(network(config.student.name)).requires_grad_()  # as a teacher elsewhere, it was frozen
    return (
        assemble(config, student, network(config.kd.teacher.name), fake_data())
        if config.kd
        else Classification(student)
    )


def two_images() -> Batch:
    return Batch(torch.randn(2, 3, 16, 16), torch.tensor([3, 5]), torch.tensor([3, 15]))


def composed(distiller: str, teacher: str, student: str, *words: str) -> Config:
    return find_config("digits", 1, teacher=teacher, student=student, distiller=distiller, root=CONFIGS).load(words)


FILES = [f"digits/seed-1029/{name}/resnet20-resnet8" for name in DISTILLERS]
FILES += ["digits/seed-1029/single/resnet8", "imagenet/seed-1029/single/torchvision.models.resnet18"]


@pytest.mark.parametrize("file", FILES)
def test_an_experiment_trains(file):
    config = load_config(CONFIGS / f"{file}.yml", ["kd_loss.options.negatives=8"] if "/crd/" in file else [])
    task = make_task(config)
    before = snapshot(task.student)
    take_step(task, two_images(), config)
    assert moved(task.student, before) == set(before)


@pytest.mark.parametrize("distiller", ["at", "crd"])
def test_another_loss_at_the_logits_is_that_of_the_config(distiller):
    words = ["kd_loss.logits=DKD", "kd_loss.logits_options={nontarget: 3}", "kd_loss.KD_T=2", "kd.warmup_epochs=9"]
    config = composed(distiller, "resnet20", "resnet8", *words)
    task = make_task(config)
    loss = task.logit_loss
    assert (type(loss).__name__, loss.temperature, loss.constants) == ("DKD", 2, {"nontarget": 3})
    assert task.ramp_epochs == [9, 9]
    take_step(task, two_images(), config)


def test_fsp_trains_where_the_channels_fit_and_names_the_spot_where_they_do_not():
    with pytest.raises(UserError) as error:
        make_task(composed("fsp", "vgg8", "resnet8"))
    assert str(error.value).startswith("fsp: vgg8-resnet8, spot [1, 1]: student 16→16 channels, teacher 64→128; ")
    # 64→128→256 channels in both, one feature later in the student
    config = composed("fsp", "vgg8", "resnet8x4", "kd_loss.spots=[[2, 1], [3, 2]]")
    task = make_task(config)
    assert task.distiller.spots == [(2, 1), (3, 2)]
    take_step(Pretraining(task.student, task.teacher, task.distiller), two_images(), config)
    take_step(task, two_images(), config)
