"""What is handed on between the parts of a run: keys of the config, arguments of the losses, tensors."""

import os
from contextlib import closing

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toys import NUM_CLASSES, toy_data, toy_labels, toy_source, toy_task

from distillers.registry import POLICIES
from distillers.spot_adaptive.policy import Policy
from utils.config import find_config
from utils.errors import UserError
from utils.files import publish_copy
from utils.run_folder.folder import RunDir
from utils.run_folder.resume import refuse_other_classes
from utils.training.accuracy import evaluate
from utils.training.build import assemble, build, build_network, load_data
from utils.training.precision import place_task
from utils.training.reporter import Reporter


def test_every_key_of_the_policy_reaches_it(monkeypatch):
    class Own(Policy):
        def __init__(self, setting, size: int = 1):
            super().__init__(setting)
            self.size = size

    monkeypatch.setattr(POLICIES, "_entries", {name: POLICIES.get(name) for name in POLICIES})
    POLICIES.register("own")(Own)
    words = ["kd.policy=own", "kd.policy_options.size=3", "kd.gate_temperature=2.5", "dataset.num_classes=null"]
    config = find_config("digits", 1, teacher="resnet20", student="resnet8", distiller="at")
    source = toy_source(toy_labels(), [str(k) for k in range(NUM_CLASSES)], (32, 32))
    for homo in (True, False):
        given = config.load([*words, f"kd_loss.homo={homo}".lower()])
        networks = [build_network(network, source) for network in (given.student, given.kd.teacher)]
        policy = assemble(given, *networks, source).policy
        assert (type(policy), policy.size) == (Own, 3)
        assert (policy.setting.gate_temperature, policy.setting.homogeneous) == (2.5, homo)


def test_the_seed_alone_decides_the_weights_and_the_order_of_the_images():
    source = toy_source(toy_labels(), [str(k) for k in range(NUM_CLASSES)], (32, 32))

    def made(seed):
        config = find_config("digits", seed, model="resnet8").load(
            ["dataset.num_classes=null", "training.batch_size=8"]
        )
        task, _ = build(config, source, torch.device("cpu"))
        with closing(load_data(source, config, torch.device("cpu"))) as data:
            return task.student.conv1.weight, next(iter(data.train.epoch(0))).index

    one, same, other = made(3), made(3), made(4)
    assert [torch.equal(a, b) for a, b in zip(one, same)] == [True, True]
    assert [torch.equal(a, b) for a, b in zip(one, other)] == [False, False]


def test_the_same_classes_in_another_order_are_other_classes():
    source = toy_source(toy_labels(), ("a", "b", "c"))
    refuse_other_classes({"data": source.describe()}, source, "it")
    with pytest.raises(UserError, match=r"it knows other classes than the data set: .* number 0 is 'b', here 'a'"):
        refuse_other_classes({"data": source.describe() | {"classes": ["b", "a", "c"]}}, source, "it")


def test_a_file_is_copied_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("content")
    publish_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "content"


def test_what_a_resumed_run_does_again_replaces_what_tensorboard_had(tmp_path):
    for resumed_at, epochs, accuracy in ((0, (1, 2), 10.0), (1, (2, 3), 20.0)):
        with closing(Reporter(RunDir(tmp_path), resumed_at)) as reporter:
            for epoch in epochs:
                means = {"phase": "train", "train": {"loss/total": 1.0, "top1": accuracy}, "lr": {"student": 0.1}}
                reporter.end_epoch({"epoch": epoch, "epochs": 3, "global_epoch": epoch, "seconds": 1.0} | means, 0.0)
    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("accuracy/top1/train")
    assert [(event.step, event.value) for event in shown] == [(1, 10.0), (2, 20.0), (3, 20.0)]


def test_in_half_precision_the_weights_of_the_teacher_alone_are_cast():
    config = find_config("digits", 1, teacher="resnet20", student="resnet8", distiller="at")
    source = toy_source(toy_labels(), [str(k) for k in range(NUM_CLASSES)], (32, 32))
    given = config.load(["training.precision=bf16", "dataset.num_classes=null"])
    networks = [build_network(network, source) for network in (given.student, given.kd.teacher)]
    task = place_task(assemble(given, *networks, source), given, torch.device("cpu"), (32, 32))
    assert (task.student.conv1.weight.dtype, task.teacher.conv1.weight.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("mode", [True, False])
def test_an_evaluation_puts_the_mode_back(mode):
    student = toy_task().student.train(mode)
    evaluate(student, toy_data().val, torch.device("cpu"))
    assert student.training == mode
