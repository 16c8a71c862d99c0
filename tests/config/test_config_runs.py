"""The files under configs/ do what they say: their networks are built and take one real step of training."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toys import take_step

from datasets.batch import Batch
from distillers.task import Classification, Task
from utils.config import Config, ModelConfig, find_config, load_config
from utils.config.layers import Layers
from utils.training.build import assemble, build_network
from utils.training.optim import make_optimizers

REPO = Path(__file__).resolve().parents[2]
EXPERIMENTS = sorted(path.relative_to(REPO) for path in REPO.glob("configs/*/seed-*/*/*.yml"))

# Classes and image size. ImageNet's networks take any size, and 224 would only be slower.
SHAPES = {
    "cifar-10": (10, 32),
    "cifar-100": (100, 32),
    "digits": (10, 32),
    "imagefolder": (7, 64),
    "imagenet": (1000, 64),
    "tiny-imagenet": (200, 64),
}


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(REPO)


def fake_data(dataset: str) -> SimpleNamespace:
    """What building a task asks of `Data`: four training samples of every class, and no images."""
    classes, size = SHAPES[dataset]
    return SimpleNamespace(num_classes=classes, image_size=(size, size), labels=torch.arange(4 * classes) % classes)


@functools.cache
def network(model: str, dataset: str):
    """As a run builds it, with random weights, once for all files."""
    return build_network(ModelConfig(name=model), fake_data(dataset))


def trainable(model: str, dataset: str):
    """A copy, for the original is shared, and frozen if it has been a teacher."""
    return copy.deepcopy(network(model, dataset)).requires_grad_()


def make_task(config: Config) -> Task:
    dataset = config.dataset.name
    if config.model:
        return Classification(trainable(config.model.name, dataset))
    kd = config.kd
    return assemble(config, trainable(kd.student.name, dataset), network(kd.teacher.name, dataset), fake_data(dataset))


def assert_trains(config: Config) -> None:
    """One step on two random images, with the optimisers that the config asks for."""
    task = make_task(config)
    optimizers = make_optimizers(task.parameter_groups(), config)
    classes, size = SHAPES[config.dataset.name]
    index = torch.randint(4 * classes, (2,))
    before = [parameter.detach().clone() for parameter in task.student.parameters()]
    output = take_step(task.train(), Batch(torch.randn(2, 3, size, size), index % classes, index))
    for scheduled in optimizers.values():
        scheduled.optimizer.step()
    assert all(part.isfinite() for part in output.parts.values())
    after = list(task.student.parameters())
    assert all(parameter.isfinite().all() for parameter in after)
    assert not any(map(torch.equal, after, before))


def chosen() -> list[Path]:
    """A file for every distiller, and of each data set one for every network or pair; all of FSP, whose pairs must fit.

    What distillers make of unequal networks is tested apart, and what the other files say with their values.
    """
    seen, files = set(), []
    for path in sorted(EXPERIMENTS, key=lambda path: "ResNet50" in path.name):  # which takes longest
        _, dataset, _, method, networks = path.parts
        kinds = {method, (dataset, networks)}
        if method == "fsp" or not kinds <= seen:
            files.append(path)
            seen |= kinds
    return files


@pytest.mark.parametrize("path", chosen(), ids=lambda path: "/".join((path.parts[1], *path.parts[3:])))
def test_an_experiment_trains(path):
    assert_trains(load_config(path, ["kd_loss.options.negatives=8"] if path.parts[3] == "crd" else []))


@pytest.mark.parametrize("dataset", ["cifar-10", "cifar-10-mini", "imagefolder"])
def test_a_data_set_without_experiments_of_its_own_trains_what_is_composed(dataset):
    assert_trains(find_config(dataset, 1, model="resnet8").load())
    assert_trains(find_config(dataset, 1, teacher="resnet14", student="resnet8", distiller="at").load())


def test_no_file_is_left_out():
    """Every file is an experiment, or the base of one, or the base of a data set tried above."""
    tried = ("cifar-10", "cifar-10-mini", "imagefolder", "csv", "parquet")
    covered = {f"configs/{name}/base.yml" for name in tried}
    for path in EXPERIMENTS:
        layers = Layers("")
        layers.add_file(path)
        covered |= {source for source, _ in layers.parts}
    assert covered == {str(path.relative_to(REPO)) for path in REPO.glob("configs/**/*.yml")}
