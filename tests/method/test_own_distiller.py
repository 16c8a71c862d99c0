"""A distiller, or a loss at the logits, of one's own takes one file, here those of docs/extending.md, and its name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import shown_file
from toys import take_step, toy_batch, toy_task

from distillers import DISTILLERS
from models import get_model
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint

REPO = Path(__file__).resolve().parents[2]


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


def test_one_that_writes_into_a_feature_or_makes_parameters_in_a_step_is_named():
    class Writes(DISTILLERS.get("at")):
        def spot_loss(self, k, student, teacher, *others):
            return super().spot_loss(k, student, teacher.mul_(0), *others)

    class Grows(DISTILLERS.get("at")):
        def spot_loss(self, *given):
            self.late = torch.nn.Linear(2, 2)
            return super().spot_loss(*given)

    for kind, message in ((Writes, "writes into a tensor"), (Grows, "has made parameters in a step")):
        with pytest.raises(UserError, match=f"^distiller {kind.__name__}.* {message}"):
            take_step(toy_task(kind), toy_batch())
