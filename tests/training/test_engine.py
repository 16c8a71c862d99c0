"""The training loop: exact repetition, exact resumption, what it writes and when it stops."""

import math
import re

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import (
    RECIPE,
    assert_equal,
    assert_same,
    break_off,
    finish,
    gate_records,
    make_engine,
    records,
    toy_config,
)
from toys import ToyNet

from distillers import DISTILLERS
from distillers.spot_adaptive.selection import SELECTIONS
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.run_folder.records import read_epochs
from utils.run_folder.weights import load_weights

SHORT = {"epochs": 1, "lr_decay_epochs": [], "save_every_steps": 2}
LONGER = {"epochs": 2, "lr_decay_epochs": [1], "save_every_steps": 2}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Finished runs, made once for every kind of task."""
    runs = {}

    def get(distiller, selection, config):
        key = (distiller, selection, str(config.to_dict()))
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            torch.manual_seed(0)
            finish(make_engine(runs[key], distiller, selection, config=config))
        return RunDir(runs[key])

    return get


@pytest.fixture(scope="module")
def finished_run(uninterrupted):
    return uninterrupted("at", "adaptive", toy_config(save_ep_freq=2))


class TestResuming:
    @pytest.mark.parametrize(
        ("distiller", "selection", "saves", "keys"),
        [
            *((distiller, "adaptive", 1, SHORT) for distiller in (None, *sorted(set(DISTILLERS) - {"fsp", "ft"}))),
            *(("at", selection, 1, SHORT) for selection in sorted(set(SELECTIONS) - {"adaptive"})),
            *(("at", "adaptive", saves, LONGER) for saves in (2, 3, 5)),  # within and between epochs
            *(("fsp", "adaptive", saves, SHORT) for saves in (1, 3, 6)),  # in pre-training
            ("ft", "adaptive", 7, SHORT),  # and after it
            ("at", "adaptive", 1, LONGER | {"save_every_steps": None}),
            *((distiller, "adaptive", saves, LONGER | RECIPE) for distiller, saves in (("fsp", 8), (None, 2))),
        ],
    )
    def test_ends_as_if_never_interrupted(self, tmp_path, uninterrupted, distiller, selection, saves, keys):
        config = toy_config(**keys)
        engine = make_engine(tmp_path / "run", distiller, selection, config=config)
        break_off(engine, saves)
        finish(make_engine(tmp_path / "run", distiller, selection, resume=True, config=config))
        assert_same(engine.run, uninterrupted(distiller, selection, config))

    def test_of_a_finished_run_does_nothing_but_report_and_with_more_epochs_goes_on(self, tmp_path):
        first = make_engine(tmp_path / "run", config=toy_config(**SHORT))
        result = finish(first)
        before = read_checkpoint(first.run.last)
        again = make_engine(tmp_path / "run", resume=True, config=toy_config(**SHORT))
        assert finish(again) == result
        assert_equal(read_checkpoint(again.run.last), before)
        more = make_engine(tmp_path / "run", resume=True, config=toy_config(**LONGER))
        finish(more)
        assert [record["epoch"] for record in records(more.run)] == [1, 2]

    @pytest.mark.parametrize("step", [0, 1])  # between epochs and within one
    def test_without_its_best_checkpoint_chooses_the_best_anew(self, tmp_path, step):
        engine = make_engine(tmp_path, config=toy_config(**LONGER))
        engine._step(next(iter(engine.data.train.epoch(0))))
        engine.best = {"top1": 99.0, "class_mean": 99.0, "epoch": 1}  # that no later epoch is better than
        engine.val = {"top1": 50.0, "class_mean": 40.0}
        engine.progress.epoch, engine.progress.step = 1, step
        engine.save(is_best=True)
        engine.run.best.unlink()
        engine.run.close()
        again = make_engine(tmp_path, resume=True, config=toy_config(**LONGER))
        assert again.best["epoch"] == (0 if step else 1)
        assert finish(again)["best_top1"] >= (0 if step else 50.0)
        assert again.run.best.exists()

    def test_on_other_validation_images_evaluates_the_best_epoch_again(self, tmp_path, caplog):
        engine = make_engine(tmp_path, config=toy_config(**LONGER))
        break_off(engine, 3)
        content = read_checkpoint(engine.run.last)
        assert content["best"]["epoch"] == 1
        top1 = content["best"]["top1"]
        content["best"]["top1"] = 99.0
        content["data"]["val_images"] += 1
        torch.save(content, engine.run.last)
        again = make_engine(tmp_path, resume=True, config=toy_config(**LONGER))
        again.run.result.touch()
        result = finish(again)
        line = rf"validation is not as before \(val_images\): the best epoch, 1, has {top1:.2f}% now"
        assert re.search(line, caplog.text)
        assert result["best_top1"] == max(record["val"]["top1"] for record in records(again.run))
        torch.save(read_checkpoint(again.run.last) | {"data": content["data"]}, again.run.last)
        finished = make_engine(tmp_path, resume=True, config=toy_config(**LONGER))
        assert finish(finished) == result, "nothing is left to be compared"

    def test_refuses_the_checkpoint_of_another_number_of_images(self, tmp_path):
        engine = make_engine(tmp_path / "run", "at", config=toy_config(**SHORT))
        finish(engine)
        content = read_checkpoint(engine.run.last)
        content["gates"]["sample_seen"] = content["gates"]["sample_seen"][1:]
        torch.save(content, engine.run.last)
        with pytest.raises(UserError, match=r"was trained on \d+ images, here are \d+; --overwrite starts anew"):
            make_engine(tmp_path / "run", "at", resume=True)


def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    engine = make_engine(tmp_path / "run")
    break_off(engine, 1)
    good = read_checkpoint(engine.run.last)
    engine = make_engine(tmp_path / "run", resume=True)
    with torch.no_grad():
        next(engine.task.student.parameters()).fill_(torch.nan)  # of which the policy sees the features
    message = r"no longer finite, at train epoch 2 step 1: loss/ce nan, .*last\.pth; a smaller training\.lr may help"
    with pytest.raises(UserError, match=message):
        finish(engine)
    assert_equal(read_checkpoint(engine.run.last), good)


def test_a_validation_that_is_not_finite_is_null_in_the_records_and_does_not_end_the_run(tmp_path, monkeypatch):
    """Resumed after an epoch whose evaluation overflows."""
    engine = make_engine(tmp_path / "run")
    good = {"loss/total": 1.0, "top1": 50.0, "class_mean": math.nan}
    results = iter([good, good | {"loss/total": math.nan, "top1": 20.0}])
    monkeypatch.setattr("utils.training.engine.evaluate", lambda *how: next(results))
    break_off(engine, 2)
    monkeypatch.undo()
    finish(make_engine(tmp_path / "run", resume=True))
    run = engine.run
    assert [math.isnan(record["val"]["loss/total"]) for record in read_epochs(run.metrics, "train")] == [0, 1, 0]
    assert "NaN" not in run.metrics.read_text()
    log = run.log.read_text()
    assert log.count("train 2/3: loss/total, class_mean of the validation images is not finite") == 1
    assert "running statistics of BatchNorm" in log


class TestRecords:
    def test_metrics_hold_one_line_per_epoch_and_tensorboard_shows_the_same_figures(self, finished_run):
        lines = records(finished_run)
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert lines[0]["lr"] == {"student": 0.05, "agent": 0.025}
        assert lines[2]["lr"]["student"] == pytest.approx(0.0005)
        losses = {f"loss/{name}" for name in ("total", "ce", "kl", "f1", "f2", "policy")}
        gates = {"gate/f1", "gate/f2", "gate/logits"}
        assert losses | gates | {"top1"} <= lines[0]["train"].keys()
        assert {"loss/total", "top1", "class_mean"} == lines[0]["val"].keys()

        board = EventAccumulator(str(finished_run.path)).Reload()
        others = {"accuracy/top1/train", "accuracy/top1/val", "lr/student", "lr/agent"}
        assert {f"{loss}/train" for loss in losses} | gates | others <= set(board.Tags()["scalars"])
        shown = [event.value for event in board.Scalars("accuracy/top1/val")]
        assert shown == pytest.approx([line["val"]["top1"] for line in lines], rel=1e-6)
        assert [event.step for event in board.Scalars("gate/f1")] == [1, 2, 3]

    def test_the_log_is_made_of_whole_lines_with_what_one_wants_to_know(self, finished_run):
        text = finished_run.log.read_text()
        assert not {"\r", "\x1b"} & set(text)
        assert all(words in text for words in ("train 3/3 | loss", "distilled f1 ", "left 00:00"))

    def test_the_checkpoint_holds_the_students_plain_weights_of_the_first_epoch_with_the_highest_accuracy(
        self, finished_run
    ):
        load_weights(ToyNet(), finished_run.best)
        content = read_checkpoint(finished_run.best)
        accuracies = [line["val"]["top1"] for line in records(finished_run)]
        assert content["config"] == toy_config(save_ep_freq=2).to_dict()
        best = 1 + accuracies.index(max(accuracies))
        assert (content["best"]["top1"], content["best"]["epoch"]) == (max(accuracies), best)

    def test_best_of_equal_epochs_is_the_first(self, tmp_path, monkeypatch):
        same = {"loss/total": 1.0, "top1": 50.0, "class_mean": 50.0}
        monkeypatch.setattr("utils.training.engine.evaluate", lambda *_, **__: dict(same))
        assert finish(make_engine(tmp_path, distiller=None, config=toy_config(**LONGER)))["best_epoch"] == 1

    def test_keeps_a_checkpoint_of_every_so_many_epochs(self, finished_run):
        assert finished_run.kept_epochs() == [finished_run.epoch_checkpoint(2)]

    def test_every_samples_gates_are_counted_over_the_whole_run(self, finished_run):
        stored = np.load(finished_run.gate_samples / "epoch-3.npz")
        assert stored["seen"].tolist() == [3] * 40
        assert (stored["distilled"] <= 3).all()  # each sample's own, not its class's
        by_class = [stored["distilled"][k::5].mean(axis=0) / 3 for k in range(5)]
        shares = np.mean([line["classes"] for line in gate_records(finished_run)], axis=0)
        assert np.allclose(by_class, shares, atol=1e-3)


@pytest.mark.parametrize(("limit", "said"), [(0.0, 1), (10**6, 0)])
def test_a_long_run_says_once_after_its_first_steps_how_long_it_takes(tmp_path, monkeypatch, limit, said):
    monkeypatch.setattr("utils.training.engine.LONG_SECONDS", limit)
    monkeypatch.setattr("utils.training.engine.WARM_UP", 1)
    monkeypatch.setattr("utils.training.engine.TIMED", 2)
    finish(make_engine(tmp_path / "run", distiller=None, config=toy_config(**LONGER)))
    text = (tmp_path / "run/log.txt").read_text()
    assert len(re.findall(r"about [\d:]+ for 2 epochs, validation not counted", text)) == said
