"""Runs with everything that is off by default, and the moving average of the weights."""

import json

import pytest
import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from toy_runs import (
    RECIPE,
    PowerCut,
    assert_equal,
    cut_power_after,
    finish,
    gate_records,
    make_engine,
    records,
    toy_config,
)
from toys import CPU, ToyNet, toy_data

from utils.convert import export_network
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.accuracy import evaluate
from utils.training.average import WeightAverage
from utils.training.restore import restore


@pytest.mark.parametrize(("distiller", "saves"), [("fsp", 8), (None, 2)])
def test_everything_at_once_ends_as_if_never_interrupted(tmp_path, distiller, saves):
    """Cut off in the middle of the first epoch after a pre-training, and without a teacher."""
    config = toy_config(**RECIPE, save_every_steps=2, epochs=2, lr_decay_epochs=[1])

    def engine(name, resume=False):
        return make_engine(tmp_path / name, distiller, resume=resume, config=config)

    result = finish(engine("whole"))
    cut = engine("cut")
    start = cut.task.student.fc.weight.detach().clone()
    cut_power_after(cut, saves)
    with pytest.raises(PowerCut):
        finish(cut)
    assert cut.progress.step
    finish(engine("cut", resume=True))
    cut, whole = RunDir(tmp_path / "cut"), RunDir(tmp_path / "whole")
    expected = read_checkpoint(whole.last)
    assert_equal(read_checkpoint(cut.last), expected)
    assert records(cut) == records(whole)
    if distiller:
        assert gate_records(cut) == gate_records(whole)

    average = ToyNet()
    average.load_state_dict(expected["ema"])
    assert not any(torch.equal(average.fc.weight, other) for other in (start, expected["model"]["fc.weight"]))
    found = evaluate(average, toy_data().val, CPU)["top1"]
    last = [json.loads(line) for line in whole.metrics.read_text().splitlines()][-1]["val"]
    assert result["ema_last_top1"] == last["ema/top1"] == pytest.approx(found)
    assert result["last_top1"] == last["top1"]


def test_a_run_that_asks_for_an_average_later_begins_it_with_the_weights_that_it_has(tmp_path):
    cut = make_engine(tmp_path, None)
    cut_power_after(cut, 1)
    with pytest.raises(PowerCut):
        finish(cut)
    resumed = make_engine(tmp_path, None, resume=True, config=toy_config(ema_decay=0.9))
    assert_equal(resumed.phase.average.state_dict(), read_checkpoint(RunDir(tmp_path).last)["model"])


def test_the_average_is_that_of_pytorch():
    torch.manual_seed(0)
    network = ToyNet()
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.8), use_buffers=True)
    theirs.update_parameters(network)  # it begins with the first weights that it sees
    ours = WeightAverage(network, 0.8)
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        ours.update()
        theirs.update_parameters(network)
    found, expected = ours.state_dict(), theirs.module.state_dict()
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.equal(found[name], value), name
        else:  # how many batches there were, which theirs rounds down to none
            assert found[name] == network.state_dict()[name] == 3
    assert not ours.network.training


def test_tools_take_the_average_if_asked_for_and_say_if_there_is_none(tmp_path):
    weights, average = ToyNet().state_dict(), ToyNet().state_dict()
    torch.save({"model": weights, "ema": average}, tmp_path / "with.pth")
    torch.save({"model": weights}, tmp_path / "without.pth")
    export_network(tmp_path / "with.pth", tmp_path / "average.pth", average=True)
    assert_equal(dict(read_checkpoint(tmp_path / "average.pth")), dict(average))
    for tool in (lambda file: export_network(file, tmp_path / "none.pth", average=True), restore_average):
        with pytest.raises(UserError, match=r"without\.pth: holds no moving average of weights; training\.ema_decay"):
            tool(tmp_path / "without.pth")


def restore_average(file):
    return restore(file, average=True)
