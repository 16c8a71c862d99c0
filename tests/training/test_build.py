"""What is handed on between the parts of a run: keys of the config, arguments of the losses, tensors."""

import os

import pytest
import torch
from toys import NUM_CLASSES, take_step, toy_batch, toy_data, toy_labels, toy_source, toy_task

from distillers.registry import POLICIES
from distillers.spot_adaptive import distillation
from distillers.spot_adaptive.policy import Policy
from utils.config import find_config
from utils.errors import UserError
from utils.files import publish_copy
from utils.run_folder.networks import refuse_other_classes
from utils.training.accuracy import evaluate
from utils.training.build import assemble, build_network


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


def test_the_routing_loss_is_of_the_routed_samples_and_its_quota_of_the_whole_batch(monkeypatch):
    given = []

    def spy(*arguments):
        given.extend(arguments)
        return original(*arguments)

    original = distillation.routing_loss
    monkeypatch.setattr(distillation, "routing_loss", spy)
    monkeypatch.setattr(distillation, "world_size", lambda: 3)
    task, batch = toy_task("at", routing_share=0.5, gamma=2.0), toy_batch(8)
    logits = take_step(task, batch).logits
    _, student_ce, logits_gate, gamma, processes = given
    torch.testing.assert_close(student_ce, torch.nn.functional.cross_entropy(logits[:4], batch.label[:4]))
    assert (len(logits_gate), gamma, processes) == (8, 2.0, 3)


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


@pytest.mark.parametrize("mode", [True, False])
def test_an_evaluation_puts_the_mode_back(mode):
    student = toy_task().student.train(mode)
    evaluate(student, toy_data().val, torch.device("cpu"))
    assert student.training == mode
