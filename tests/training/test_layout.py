"""Channels last: the layout of maps in memory, which changes nothing but the speed."""

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from toys import IMAGE_SIZE, toy_batch, toy_task

from distillers.task import Classification
from distillers.vid import vid_loss
from models.staged import StagedModel, global_pool
from utils.errors import UserError
from utils.training.precision import channels_last_pays, place_task

CPU = torch.device("cpu")


def config(setting="auto", precision="fp32"):
    return SimpleNamespace(training=SimpleNamespace(channels_last=setting, precision=precision))


class ViewNet(StagedModel):
    """Says ``view`` of a map, which works in one layout only."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

    def stages(self):
        return (
            (self.conv, lambda x: x.view(x.shape[0], -1).view(x.shape[0], 4, *IMAGE_SIZE)),
            (global_pool,),
            (self.fc,),
        )


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_averages_over_positions_have_the_layout_of_the_map(layout):
    feature, teacher = (torch.randn(2, 3, 4, 4).to(memory_format=layout) for _ in range(2))
    losses = [global_pool, lambda x: vid_loss(x, torch.ones(3), teacher, torch.ones(2))]
    for loss in losses:
        x = feature.clone().requires_grad_()
        kept = []
        # A leaf's own gradient is always brought to its layout, one in the middle of the graph is not.
        y = x * 1
        y.register_hook(kept.append)
        loss(y).sum().backward()
        assert kept[0].is_contiguous(memory_format=layout)


def test_maps_are_in_the_layout_of_the_weights_which_the_twin_still_shares():
    """Losses and gradients are compared with formulas in test_fast_path, where maps are so too."""
    assert place_task(toy_task("at"), config(False), CPU, IMAGE_SIZE).student.conv2.weight.is_contiguous()
    task = place_task(toy_task("at"), config(), CPU, IMAGE_SIZE)
    features, _ = task.teacher.features(toy_batch().image)
    assert all(feature.stride(1) == 1 for feature in features[:3])
    with torch.no_grad():
        task.student.conv2.weight.add_(1)
        task.student.bn1.running_mean.add_(1)
    assert torch.equal(task._twin[0].conv2.weight, task.student.conv2.weight)
    assert torch.equal(task._twin[0].bn1.running_mean, task.student.bn1.running_mean)


def test_a_network_that_cannot_do_with_it_goes_on_without_unless_it_is_asked_for(caplog):
    with caplog.at_level(logging.INFO, logger="sakd"):
        task = place_task(Classification(ViewNet()), config(), CPU, IMAGE_SIZE)
    assert task.student.conv.weight.is_contiguous()
    assert task.student(torch.randn(2, 3, *IMAGE_SIZE)).shape == (2, 5)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("training.channels_last: off, a network fails with it: ")
    with pytest.raises(UserError, match=r"training\.channels_last: true, but a network fails: [^\n]*; try auto$"):
        place_task(Classification(ViewNet()), config(True), CPU, IMAGE_SIZE)


@pytest.mark.parametrize(
    ("device", "capability", "precision", "pays"),
    [
        ("cpu", (8, 0), "fp32", True),
        ("cuda", (8, 0), "fp32", False),
        ("cuda", (8, 0), "tf32", True),
        ("cuda", (8, 0), "bf16", True),
        ("cuda", (7, 5), "tf32", False),
    ],
)
def test_a_gpu_computes_so_only_where_tensor_cores_do_the_work(monkeypatch, device, capability, precision, pays):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert channels_last_pays(torch.device(device), precision) is pays
