"""A distiller, or a loss at the logits, of one's own takes one file, here those of docs/extending.md, and its name."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from documents import shown_file
from toys import take_step, toy_batch, toy_task

import distillers
from distillers import DISTILLERS
from distillers.base import Distiller
from distillers.logits import LOGIT_LOSSES
from models import get_model
from utils.cli import main_distill
from utils.errors import UserError
from utils.registry import names_in_source
from utils.run_folder.checkpoint import read_checkpoint


@pytest.fixture
def added(tmp_path, monkeypatch):
    """Files that somebody has put into the folder of the distillers."""
    files = {name: shown_file(f"distillers/{name}.py") for name in ("stats", "wsld")}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    for registry in (DISTILLERS, LOGIT_LOSSES):
        monkeypatch.setattr(registry, "_entries", {name: registry.get(name) for name in registry if name not in files})
        monkeypatch.setattr(registry, "_loaded", False)
    distillers.__path__.append(str(tmp_path))
    names_in_source.cache_clear()
    yield
    distillers.__path__.remove(str(tmp_path))
    names_in_source.cache_clear()
    for name in files:
        sys.modules.pop(f"distillers.{name}", None)


@pytest.mark.usefixtures("added")
def test_one_file_and_its_name_are_all_that_training_takes(tmp_path):
    torch.save(get_model("resnet8", 10).state_dict(), tmp_path / "teacher.pth")
    names = ["--dataset", "digits", "--teacher", "resnet8", "--student", "resnet8", "--distiller", "stats"]
    words = ["kd_loss.logits=wsld", f"kd.teacher.checkpoint={tmp_path / 'teacher.pth'}", f"run.root={tmp_path}"]
    words += ["dataset.img_h=8", "dataset.img_w=8", "training.epochs=2", "training.device=cpu"]
    main_distill(arguments=[*names, *words, "training.batch_size=256", "validation.batch_size=256"])

    (run,) = tmp_path.glob("digits/1029/adaptive-stats/*")
    first, second = (json.loads(line)["train"] for line in (run / "metrics.jsonl").read_text().splitlines())
    assert all(first[f"loss/{spot}"] > 0 and f"gate/{spot}" in first for spot in ("f1", "f2", "f3"))
    assert first["loss/logits"] > 0
    assert second["loss/total"] < first["loss/total"]
    assert "distiller.widen.0.weight" in read_checkpoint(run / "ckpt/last.pth")["extra"]


@pytest.mark.usefixtures("added")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            'register_distiller("AT")(object)',
            r"ValueError: distiller 'AT' is registered twice, also as 'at' in distillers\.at",
        ),
        ("def f(:", r"SyntaxError: "),
        ("import nowhere", r"ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path, text, message):
    (tmp_path / "zz.py").write_text(f"from distillers.registry import register_distiller\n{text}\n")
    with pytest.raises(UserError, match=rf"^importing distillers\.zz failed: {message}"):
        DISTILLERS.get("stats")


def make_parameters(own, teacher, gate, loss):
    own.late = torch.nn.Linear(2, 2)
    return loss


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda own, teacher, gate, loss: loss.expand(8), r": {} gives a tensor of shape \(8,\), must be a"),
        (lambda own, teacher, gate, loss: None, ": {} gives a NoneType, must be a"),
        (lambda own, teacher, gate, loss: loss + teacher.mul_(0).sum(), " writes into a tensor"),
        (lambda own, teacher, gate, loss: loss + gate.mul_(0).sum(), " writes into a tensor"),
        (make_parameters, ": has made parameters in a step"),
    ],
)
def test_one_that_does_what_it_must_not_is_named(spoil, message):
    class Wrong(DISTILLERS.get("at")):
        def spot_loss(self, k, student, teacher, gate, batch):
            return spoil(self, teacher, gate, super().spot_loss(k, student, teacher, gate, batch))

    class WrongToo(LOGIT_LOSSES.get("kl")):
        def forward(self, student, teacher, gate, batch):
            return spoil(self, teacher, gate, super().forward(student, teacher, gate, batch))

    with pytest.raises(UserError, match="^distiller Wrong" + message.format("spot_loss of spot 0")):
        take_step(toy_task(Wrong), toy_batch())
    with pytest.raises(UserError, match="^loss at the logits WrongToo" + message.format("forward")):
        take_step(toy_task(logit_loss=WrongToo()), toy_batch())


def test_one_without_a_loss_is_named():
    class Empty(Distiller):
        pass

    with pytest.raises(UserError, match=r"^Empty: names no loss, and overrides neither"):
        toy_task(Empty)
