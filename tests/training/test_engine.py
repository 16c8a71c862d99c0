"""The training loop: exact repetition, exact resumption, what it writes and when it stops."""

import math
import os
import re
import signal

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from toy_runs import (
    EPOCHS,
    STEPS,
    PowerCut,
    assert_equal,
    cut_power_after,
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
from utils.processes.stopping import Interrupted
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.run_folder.records import read_epochs
from utils.run_folder.weights import load_weights


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Finished runs, made once for every kind of task."""
    runs = {}

    def get(distiller, selection, config):
        key = (distiller, selection, config.training.save_every_steps)
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("uninterrupted") / "run"
            torch.manual_seed(0)
            finish(make_engine(runs[key], distiller, selection, config=config))
        return RunDir(runs[key])

    return get


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    torch.manual_seed(0)
    engine = make_engine(tmp_path_factory.mktemp("records") / "run", config=toy_config(save_ep_freq=2))
    finish(engine)
    return engine.run


class TestRepetition:
    def test_the_same_seed_gives_the_same_run_bit_for_bit(self, tmp_path):
        for name in ("first", "second"):
            finish(make_engine(tmp_path / name))
        first, second = RunDir(tmp_path / "first"), RunDir(tmp_path / "second")
        assert_equal(read_checkpoint(second.last), read_checkpoint(first.last))
        assert records(second) == records(first)

    def test_another_seed_gives_another_run(self, tmp_path):
        finish(make_engine(tmp_path / "first"))
        finish(make_engine(tmp_path / "second", config=toy_config(seed=1)))
        first, second = (read_checkpoint(RunDir(tmp_path / name).last)["model"] for name in ("first", "second"))
        assert not torch.equal(first["conv1.weight"], second["conv1.weight"])


class TestResuming:
    def check(self, tmp_path, uninterrupted, distiller, selection, saves, config):
        expected = uninterrupted(distiller, selection, config)
        engine = make_engine(tmp_path / "run", distiller, selection, config=config)
        cut_power_after(engine, saves)
        with pytest.raises(PowerCut):
            finish(engine)
        torch.manual_seed(99)  # a new process has another random state
        finish(make_engine(tmp_path / "run", distiller, selection, resume=True, config=config))
        run = RunDir(tmp_path / "run")
        assert_equal(read_checkpoint(run.last), read_checkpoint(expected.last))
        assert_equal(read_checkpoint(run.best)["model"], read_checkpoint(expected.best)["model"])
        assert records(run) == records(expected)
        if distiller is not None:
            assert gate_records(run) == gate_records(expected)

    @pytest.mark.parametrize(
        ("distiller", "selection", "saves"),
        [
            *((distiller, "adaptive", 5) for distiller in (None, *sorted(set(DISTILLERS) - {"at", "fsp"}))),
            *(("at", selection, 5) for selection in sorted(set(SELECTIONS) - {"adaptive"})),
            *(("at", "adaptive", saves) for saves in range(1, 8)),  # within and between epochs
            *(("fsp", "adaptive", saves) for saves in (1, 2, 3, 4, 5, 6, 8)),  # in pre-training too
        ],
    )
    def test_ends_as_if_never_interrupted(self, tmp_path, uninterrupted, distiller, selection, saves):
        self.check(tmp_path, uninterrupted, distiller, selection, saves, toy_config(save_every_steps=2))

    def test_does_so_between_epochs_without_checkpoints_within_them(self, tmp_path, uninterrupted):
        self.check(tmp_path, uninterrupted, "at", "adaptive", 2, toy_config())

    def test_of_a_finished_run_does_nothing_but_report(self, tmp_path):
        first = make_engine(tmp_path / "run")
        result = finish(first)
        before = read_checkpoint(first.run.last)
        again = make_engine(tmp_path / "run", resume=True)
        assert finish(again) == result
        assert_equal(read_checkpoint(again.run.last), before)

    def test_with_more_epochs_goes_on(self, tmp_path):
        finish(make_engine(tmp_path / "run"))
        engine = make_engine(tmp_path / "run", resume=True, config=toy_config(epochs=EPOCHS + 1))
        finish(engine)
        assert [record["epoch"] for record in records(engine.run)] == [1, 2, 3, 4]

    @pytest.mark.parametrize("saves", [1, 3], ids=["between epochs", "within an epoch"])
    def test_without_its_best_checkpoint_chooses_the_best_anew(self, tmp_path, saves):
        engine = make_engine(tmp_path)
        engine.best = {"top1": 99.0, "class_mean": 99.0, "epoch": 1}  # that no later epoch is better than
        engine.val = {"top1": 50.0, "class_mean": 40.0}
        engine.progress.epoch, engine.progress.step = 1, 0 if saves == 1 else 1
        engine.save(is_best=True)
        engine.run.best.unlink()
        engine.run.close()
        again = make_engine(tmp_path, resume=True)
        assert again.best["epoch"] == (1 if saves == 1 else 0)
        assert finish(again)["best_top1"] >= (50.0 if saves == 1 else 0)
        assert again.run.best.exists()

    def test_refuses_the_checkpoint_of_another_distiller(self, tmp_path):
        finish(make_engine(tmp_path / "run", "at"))
        with pytest.raises(UserError, match="not of this configuration"):
            make_engine(tmp_path / "run", "fitnet", resume=True)

    def test_refuses_the_checkpoint_of_another_number_of_images(self, tmp_path):
        engine = make_engine(tmp_path / "run", "at")
        finish(engine)
        content = read_checkpoint(engine.run.last)
        content["gates"]["sample_seen"] = content["gates"]["sample_seen"][1:]
        torch.save(content, engine.run.last)
        with pytest.raises(UserError, match=r"was trained on \d+ images, here are \d+; --overwrite starts anew"):
            make_engine(tmp_path / "run", "at", resume=True)


class TestStopping:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
    def test_a_signal_lets_the_step_finish_and_saves_within_it(self, tmp_path, number):
        engine = make_engine(tmp_path / "run")
        step, steps_done = engine._step, 0

        def step_and_signal(*arguments):
            nonlocal steps_done
            step(*arguments)
            steps_done += 1
            if steps_done == STEPS + 3:
                os.kill(os.getpid(), number)

        engine._step = step_and_signal
        before = signal.getsignal(number)
        with pytest.raises(Interrupted, match=r"stopped in train 2/3 after step 3/5, all saved; .*--resume"):
            finish(engine)
        assert signal.getsignal(number) is before
        assert read_checkpoint(engine.run.last)["progress"] == {"phase": 0, "epoch": 1, "step": 3}
        finish(make_engine(tmp_path / "run", resume=True))
        finish(make_engine(tmp_path / "whole"))
        stopped, whole = RunDir(tmp_path / "run"), RunDir(tmp_path / "whole")
        assert_equal(read_checkpoint(stopped.last), read_checkpoint(whole.last))
        assert records(stopped) == records(whole)

    def test_a_second_interrupt_stops_at_once(self, tmp_path):
        engine = make_engine(tmp_path / "run")
        engine._step = lambda *_: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]
        with pytest.raises(KeyboardInterrupt):
            finish(engine)

    def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_checkpoint(self, tmp_path):
        engine = make_engine(tmp_path / "run")
        cut_power_after(engine, 1)
        with pytest.raises(PowerCut):
            finish(engine)
        good = read_checkpoint(engine.run.last)
        engine = make_engine(tmp_path / "run", resume=True)
        with torch.no_grad():
            engine.task.student.fc.bias[0] = torch.nan
        with pytest.raises(UserError, match=r"no longer finite, at train epoch 2 step 1: loss/ce nan, .*last\.pth"):
            finish(engine)
        assert_equal(read_checkpoint(engine.run.last), good)


class TestValidationThatIsNotFinite:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch):
        """Trained well, and resumed, though the second epoch's evaluation overflows."""
        engine = make_engine(tmp_path / "run")
        good = {"loss/total": 1.0, "top1": 50.0, "class_mean": math.nan}
        results = iter([good, good | {"loss/total": math.nan, "top1": 20.0}])
        monkeypatch.setattr("utils.training.engine.evaluate", lambda *how: next(results))
        cut_power_after(engine, 2)
        with pytest.raises(PowerCut):
            finish(engine)
        monkeypatch.undo()
        finish(make_engine(tmp_path / "run", resume=True))
        return engine.run

    def test_is_null_in_the_records_and_does_not_end_the_run(self, run):
        assert [math.isnan(record["val"]["loss/total"]) for record in read_epochs(run.metrics, "train")] == [0, 1, 0]
        assert "NaN" not in run.metrics.read_text()

    def test_is_said_with_what_may_cause_it(self, run):
        log = run.log.read_text()
        assert log.count("train 2/3: loss/total, class_mean of the validation images is not finite") == 1
        assert "running statistics of BatchNorm" in log


class TestRecords:
    def test_metrics_hold_one_line_per_epoch(self, finished_run):
        lines = records(finished_run)
        assert [line["epoch"] for line in lines] == [1, 2, 3]
        assert lines[0]["lr"] == {"student": 0.05, "agent": 0.025}
        assert lines[2]["lr"]["student"] == pytest.approx(0.0005)
        assert {"loss/total", "loss/ce", "loss/kl", "loss/f1", "loss/f2", "loss/policy", "top1"} <= lines[0][
            "train"
        ].keys()
        assert {"gate/f1", "gate/f2", "gate/logits"} <= lines[0]["train"].keys()
        assert {"loss/total", "top1", "class_mean"} == lines[0]["val"].keys()

    def test_tensorboard_shows_the_same_figures(self, finished_run):
        board = EventAccumulator(str(finished_run.path)).Reload()
        tags = board.Tags()["scalars"]
        for tag in ("loss/ce/train", "loss/kl/train", "loss/f1/train", "loss/policy/train", "gate/f1", "gate/logits"):
            assert tag in tags
        for tag in ("accuracy/top1/train", "accuracy/top1/val", "lr/student", "lr/agent"):
            assert tag in tags
        shown = [event.value for event in board.Scalars("accuracy/top1/val")]
        assert shown == pytest.approx([line["val"]["top1"] for line in records(finished_run)], rel=1e-6)
        assert [event.step for event in board.Scalars("gate/f1")] == [1, 2, 3]

    def test_tensorboard_calls_a_run_by_its_folder(self, finished_run, tmp_path):
        assert [file.parent for file in finished_run.event_files()] == [finished_run.path]
        old = RunDir(tmp_path)
        (old.path / "events.out.tfevents.2").touch()
        old.open(resume=False, overwrite=True)
        assert old.event_files() == []

    def test_the_log_is_made_of_whole_lines_with_what_one_wants_to_know(self, finished_run):
        text = finished_run.log.read_text()
        assert "\r" not in text
        assert "\x1b" not in text
        assert "train 3/3 | loss" in text
        assert "distilled f1 " in text
        assert "left 00:00" in text

    def test_the_checkpoint_holds_the_students_plain_weights(self, finished_run):
        model = ToyNet()
        load_weights(model, finished_run.best)
        assert read_checkpoint(finished_run.best)["config"] == toy_config(save_ep_freq=2).to_dict()

    def test_best_is_the_first_epoch_with_the_highest_accuracy(self, finished_run):
        accuracies = [line["val"]["top1"] for line in records(finished_run)]
        best = read_checkpoint(finished_run.best)["best"]
        assert best["top1"] == max(accuracies)
        assert best["epoch"] == 1 + accuracies.index(max(accuracies))

    def test_best_of_equal_epochs_is_the_first(self, tmp_path, monkeypatch):
        same = {"loss/total": 1.0, "top1": 50.0, "class_mean": 50.0}
        monkeypatch.setattr("utils.training.engine.evaluate", lambda *_, **__: dict(same))
        assert finish(make_engine(tmp_path, distiller=None))["best_epoch"] == 1

    def test_keeps_a_checkpoint_of_every_so_many_epochs(self, finished_run):
        assert sorted(path.name for path in finished_run.last.parent.glob("epoch-*")) == ["epoch-2.pth"]
        assert read_checkpoint(finished_run.last.with_name("epoch-2.pth"))["progress"]["epoch"] == 2

    def test_gates_are_recorded_by_class_and_agree_with_the_shares(self, finished_run):
        lines = gate_records(finished_run)
        assert [line["global_epoch"] for line in lines] == [1, 2, 3]
        for line, record in zip(lines, records(finished_run)):
            assert line["gates"] == ["f1", "f2", "logits"]
            shares = torch.tensor(line["classes"])
            assert shares.shape == (5, 3)  # the toy classes are of equal size, so the mean over them is that of all
            expected = [record["train"][f"gate/{gate}"] for gate in line["gates"]]
            assert shares.mean(dim=0).tolist() == pytest.approx(expected, abs=1e-3)

    def test_every_samples_gates_are_counted_over_the_whole_run(self, finished_run):
        stored = np.load(finished_run.gate_samples / "epoch-3.npz")
        assert stored["seen"].tolist() == [3] * 40
        assert (stored["distilled"] <= 3).all()  # each sample's own, not its class's
        by_class = [stored["distilled"][k::5].mean(axis=0) / 3 for k in range(5)]
        shares = np.mean([line["classes"] for line in gate_records(finished_run)], axis=0)
        assert np.allclose(by_class, shares, atol=1e-3)


@pytest.mark.parametrize(("limit", "said"), [(0.0, 1), (10**6, 0)])
def test_a_long_run_says_once_after_its_first_steps_how_long_it_takes(tmp_path, monkeypatch, limit, said):
    monkeypatch.setattr("utils.training.engine.LONG", limit)
    monkeypatch.setattr("utils.training.engine.WARM_UP", 1)
    monkeypatch.setattr("utils.training.engine.TIMED", 2)
    finish(make_engine(tmp_path / "run", distiller=None))
    text = (tmp_path / "run/log.txt").read_text()
    assert len(re.findall(r"about [\d:]+ for 3 epochs, validation not counted", text)) == said
