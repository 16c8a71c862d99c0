"""Imbalanced data and a test split: weights, the choice of the best epoch, and images that are only tested."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from pictures import image_folder
from process_runs import config_file
from toy_runs import toy_config
from toys import toy_source

from models import get_model
from utils import evaluate as evaluation
from utils.config import load_config
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.run_folder.records import read_epochs, read_result
from utils.training import run as running
from utils.training.accuracy import evaluate
from utils.training.build import make_label_loss
from utils.training.restore import restore
from utils.training.run import train


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes, one with four times as many images, in three splits."""
    root = tmp_path_factory.mktemp("images")
    for name, *counts in (("ant", 16, 6), ("bee", 4, 2)):
        image_folder(root, *counts, (name,), (16, 16))
        image_folder(root / "more", 5, 0, (name,), (20, 20))
    (root / "more" / "train").rename(root / "test")
    (root / "more").rmdir()
    return root


def config(folder, images, distiller=None, **keys):
    keys = {"dataset": {}, "training": {}, **keys}
    keys["dataset"] = {"root": str(images), **keys["dataset"]}
    keys["training"] = {"epochs": 2, "lr_decay_epochs": [1], **keys["training"]}
    if distiller:
        torch.manual_seed(5)
        torch.save(get_model("resnet8", 2).state_dict(), folder / "teacher.pth")
    return load_config(str(config_file(folder, distiller, **keys)))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    settings = config(tmp_path_factory.mktemp("run"), images)
    return train(settings), RunDir(settings.run_dir)


class TestTestSplit:
    def test_is_what_the_best_epoch_achieves_on_images_nothing_was_chosen_by(self, finished):
        result, run = finished
        restored = restore(run.path)
        assert [len(part) for part in restored.source.splits().values()] == [20, 8, 10]
        found = evaluate(restored.student(), restored.test, restored.device)
        assert result["test_top1"] == found["top1"]
        assert result["test_class_mean"] == found["class_mean"]
        assert read_result(run.result)["test_top1"] == found["top1"]
        assert f"test {found['top1']:.2f}% (best epoch)" in run.log.read_text()

    def test_is_none_where_there_are_no_such_images(self, images, tmp_path):
        (tmp_path / "two").mkdir()
        for split in ("train", "val"):
            (tmp_path / "two" / split).symlink_to(images / split)
        assert not any(name.startswith("test") for name in train(config(tmp_path, tmp_path / "two")))

    def test_is_shown_by_evaluate(self, finished, capsys):
        evaluation.main([str(finished[1].path)])
        assert re.search(rf"test top-1 \(%\) *\| *{finished[0]['test_top1']:.2f}", capsys.readouterr().out)
        written = json.loads((finished[1].evaluation / "evaluation.json").read_text())["resnet8"]
        assert written["test_class_mean"] == finished[0]["test_class_mean"]


class TestAccuracyByClass:
    def test_is_in_the_records_and_the_result(self, finished):
        result, run = finished
        epochs = read_epochs(run.metrics)
        assert result["last_class_mean"] == epochs[-1]["val"]["class_mean"]
        best = epochs[result["best_epoch"] - 1]["val"]
        assert (result["best_top1"], result["best_class_mean"]) == (best["top1"], best["class_mean"])

    def test_may_choose_the_best_epoch(self, images, tmp_path, monkeypatch):
        found = iter([(70.0, 50.0), (60.0, 65.0)])

        def evaluate(*_, **__):
            top1, class_mean = next(found)
            return {"loss/total": 1.0, "top1": top1, "class_mean": class_mean}

        monkeypatch.setattr("utils.training.engine.evaluate", evaluate)
        monkeypatch.setattr(running, "test_best", lambda *_: {})
        result = train(config(tmp_path, images, validation={"best_by": "class_mean"}))
        assert (result["best_epoch"], result["best_top1"], result["best_class_mean"]) == (2, 60.0, 65.0)
        best = read_checkpoint(RunDir(config(tmp_path, images).run_dir).best)
        assert best["progress"]["epoch"] == 2


def class_weights(wanted, source):
    return make_label_loss(toy_config(class_weights=wanted), source)._class_weights


class TestClassWeights:
    SOURCE = toy_source(torch.tensor([0, 0, 0, 1]), "abc")

    def test_balanced_are_in_inverse_proportion_to_the_images(self):
        source = replace(self.SOURCE, class_names=("a", "b"))
        torch.testing.assert_close(class_weights("balanced", source), torch.tensor([4 / 6, 2.0]))

    def test_may_be_given(self):
        assert class_weights((1.0, 2.0, 3.0), self.SOURCE).tolist() == [1, 2, 3]
        assert class_weights(None, self.SOURCE) is None
        with pytest.raises(UserError, match=r"training\.class_weights: found 2 weights, and there are 3 classes"):
            class_weights((1.0, 2.0), self.SOURCE)

    @pytest.mark.parametrize("distiller", [None, "at"])
    def test_change_what_is_trained(self, images, tmp_path, distiller):
        losses = []
        for k, weights in enumerate([None, "balanced"]):
            training = {"class_weights": weights, "epochs": 1, "lr_decay_epochs": []}
            settings = config(tmp_path, images, distiller, training=training, run={"root": str(tmp_path / str(k))})
            train(settings)
            losses.append(read_epochs(RunDir(settings.run_dir).metrics)[0]["train"]["loss/total"])
        assert losses[0] != pytest.approx(losses[1], rel=1e-3)
