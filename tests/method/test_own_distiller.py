"""A distiller, or a loss at the logits, of one's own takes one file, here those of docs/extending.md, and its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documents import execute, shown_file
from toys import ToyNet, take_step, toy_batch, toy_setting, toy_task

from distillers import DISTILLERS
from models import get_model
from utils.config import find_config
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint

REPO = Path(__file__).resolve().parents[2]


@pytest.fixture
def example(monkeypatch):
    """The example's module, registered for one test alone."""
    monkeypatch.setattr(DISTILLERS, "_entries", {name: DISTILLERS.get(name) for name in DISTILLERS})
    return SimpleNamespace(**execute("distillers.stats", shown_file("distillers/stats.py")))


def test_one_file_and_its_name_are_all_that_training_takes(tmp_path):
    for package in ("configs", "datasets", "distillers", "models", "utils"):
        shutil.copytree(REPO / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in (*REPO.glob("train*"), REPO / "requirements.txt"):
        shutil.copy(file, tmp_path)
    for file in ("distillers/stats.py", "distillers/wsld.py"):
        (tmp_path / file).write_text(shown_file(file))
    torch.save(get_model("resnet14", 10).state_dict(), tmp_path / "teacher.pth")  # random, or one is trained first

    names = {"dataset": "digits", "net1": "resnet14", "net2": "resnet8", "distiller": "stats"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    options = [
        "kd_loss.logits=wsld",
        "kd.teacher.checkpoint=teacher.pth",
        "training.epochs=2",
        "training.device=cpu",
        "dataset.img_h=8",
        "dataset.img_w=8",
        "validation.batch_size=256",
    ]
    environment = {**os.environ, **names, "PATH": path}
    subprocess.run(["sh", "train.sh", *options], cwd=tmp_path, env=environment, check=True)

    run = tmp_path / "run/digits/1029/adaptive-stats/resnet14-resnet8"
    first, second = (json.loads(line)["train"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert all(first[f"loss/{spot}"] > 0 and f"gate/{spot}" in first for spot in ("f1", "f2", "f3"))
    assert first["loss/logits"] > 0
    assert second["loss/total"] < first["loss/total"]
    assert "distiller.widen.0.weight" in read_checkpoint(run / "ckpt/last.pth")["extra"]


@pytest.mark.parametrize(
    ("wrong", "found"), [(lambda loss: loss.expand(8), "a tensor of shape (8,)"), (lambda loss: None, "a NoneType")]
)
def test_a_loss_that_is_no_scalar_is_named(wrong, found):
    class Wrong(DISTILLERS.get("at")):
        def spot_loss(self, *features):
            return wrong(super().spot_loss(*features))

    with pytest.raises(UserError, match=f"^distiller Wrong: spot_loss of spot 0 gives {re.escape(found)}, must be a"):
        take_step(toy_task(Wrong), toy_batch())
    task = toy_task()
    task.logit_loss.forward = lambda *_: wrong(torch.zeros(()))
    with pytest.raises(UserError, match=f"^loss at the logits KL: forward gives {re.escape(found)}, must"):
        take_step(task, toy_batch())


def test_a_name_that_is_nearly_its_own_is_corrected(example):
    names = {"teacher": "resnet14", "student": "resnet8", "root": REPO / "configs"}
    assert find_config("digits", 1, distiller="Stats", **names).load().kd_loss.name == "stats"
    with pytest.raises(UserError, match="unknown distiller 'stat': did you mean 'stats'"):
        find_config("digits", 1, distiller="stat", **names).load()


@pytest.mark.parametrize("selection", ["adaptive", "anti", "fixed", "random"])
def test_it_works_with_every_selection_and_between_unequal_widths(example, selection):
    output = take_step(toy_task("stats", selection=selection), toy_batch())
    assert output.loss.isfinite()
    student, teacher = ToyNet(width=3), ToyNet(width=5)
    distiller = example.ChannelStatistics(toy_setting(student, teacher))
    batch = toy_batch()
    features, (of_teacher, _) = student.features(batch.image)[0], teacher.features(batch.image)
    losses = distiller(features, of_teacher, torch.ones(len(batch.label), 2), batch)
    losses.sum().backward()
    assert all(parameter.grad.any() for parameter in distiller.parameters())
