"""Runs with everything that is off by default, and the moving average of the weights."""

from functools import partial

import pytest
import torch
from toy_runs import RECIPE, assert_equal, break_off, finish, make_engine, records, toy_config
from toys import CPU, ToyNet, toy_data

from utils.convert import export_network
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.accuracy import evaluate
from utils.training.average import WeightAverage
from utils.training.restore import restore


def test_the_average_is_evaluated_beside_the_weights_that_are_trained(tmp_path):
    engine = make_engine(tmp_path, None, config=toy_config(**RECIPE))
    start = engine.task.student.fc.weight.detach().clone()
    result, average = finish(engine), ToyNet()
    content, last = read_checkpoint(engine.run.last), records(engine.run)[-1]["val"]
    average.load_state_dict(content["ema"])
    assert not any(torch.equal(average.fc.weight, other) for other in (start, content["model"]["fc.weight"]))
    found = evaluate(average, toy_data().val, CPU)["top1"]
    assert result["ema_last_top1"] == last["ema/top1"] == pytest.approx(found)
    assert result["last_top1"] == last["top1"]


def test_a_run_that_asks_for_an_average_later_begins_it_with_the_weights_that_it_has(tmp_path):
    cut = make_engine(tmp_path, None)
    break_off(cut, 1)
    resumed = make_engine(tmp_path, None, resume=True, config=toy_config(ema_decay=0.9))
    assert_equal(dict(resumed.phase.average.network.state_dict()), read_checkpoint(RunDir(tmp_path).last)["model"])


def test_the_average_moves_by_a_share_and_counters_are_copied():
    network = ToyNet()
    average = WeightAverage(network, 0.8)
    expected = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in range(3):
        network(torch.randn(4, 3, 8, 8))
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        for name, now in network.state_dict().items():
            expected[name] = expected[name].lerp(now, 0.2) if now.is_floating_point() else now.clone()
    torch.testing.assert_close(dict(average.network.state_dict()), expected)
    assert not average.network.training


def test_tools_that_are_asked_for_an_average_say_if_there_is_none(tmp_path):
    torch.save({"model": ToyNet().state_dict()}, tmp_path / "without.pth")
    for tool in (partial(export_network, out=tmp_path / "none.pth"), restore):
        with pytest.raises(UserError, match=r"without\.pth: holds no moving average of weights; training\.ema_decay"):
            tool(tmp_path / "without.pth", average=True)
