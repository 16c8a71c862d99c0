"""Evaluating: the figures are right, and files of others are kept."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from utils import evaluate, export
from utils.errors import UserError
from utils.report.table import markdown
from utils.run_folder.checkpoint import read_checkpoint
from utils.training.build import teacher_accuracy
from utils.training.meter import accuracy_text, top_k_hits
from utils.training.restore import restore

CPU = torch.device("cpu")


@pytest.fixture
def restored(trained_run):
    return restore(trained_run)


def test_accuracy_and_confusion_are_counted_as_by_hand(restored):
    class Always(nn.Module):
        """Says class 1, then class 0, whatever it sees."""

        def forward(self, images):
            return torch.tensor([[1.0, 2.0, *[0.0] * 8]]).repeat(len(images), 1)

    labels = restored.val.labels
    found = evaluate.scores(Always(), restored)
    counts = labels.bincount(minlength=10)
    assert found.top1 == pytest.approx(100 * counts[1].item() / len(labels))
    assert found.confusion[:, 1].equal(counts)
    assert found.confusion.sum() == len(labels)
    assert found.per_class() == [0.0, 100.0, *[0.0] * 8]
    confusion = torch.tensor([[3, 1], [0, 0]])
    assert evaluate.Scores(75.0, 100.0, torch.tensor([0, 0, 0, 1]), confusion).per_class() == [75.0, None]


def test_it_finds_the_accuracy_that_training_recorded_and_none_of_logits_that_are_nan(restored):
    network, recorded = restored.student(), restored.content["val"]
    found = evaluate.scores(network, restored)
    assert (found.top1, found.top5) == (pytest.approx(recorded["top1"]), pytest.approx(recorded["top5"]))
    next(network.buffers()).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        evaluate.scores(network, restored)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_students_and_teachers_are_evaluated_in_the_precision_of_the_training(trained_run, precision, dtype):
    restored, seen = restore(trained_run, [f"training.precision={precision}"]), set()

    class Probe(nn.Linear):
        def forward(self, images):
            logits = super().forward(images.mean(dim=(2, 3)))
            seen.add(logits.dtype)
            return logits

    probe = Probe(3, 10)
    evaluate.scores(probe, restored)
    teacher_accuracy(SimpleNamespace(teacher=probe), restored.config, restored, CPU)
    assert seen == {dtype}


@pytest.mark.parametrize("classes", [5, 6])
def test_top_5_is_left_out_below_six_classes(classes):
    hits = top_k_hits(torch.eye(classes), torch.arange(classes))
    assert ("top-5" in accuracy_text(dict.fromkeys(hits, 100.0))) == (classes > 5)
    scores = evaluate.Scores(100.0, 100.0 if "top5" in hits else None, torch.arange(classes), torch.eye(classes))
    cost = evaluate.Cost(1, 1.0, 1.0, dict.fromkeys(evaluate.LATENCY_BATCHES, 1.0))
    table = markdown(evaluate.summary_table({"net": (scores, cost)}))
    assert ("top5" in hits, "top-5" in table) == (classes > 5, classes > 5)


def test_the_teacher_stands_beside_the_student_and_no_link_is_written_through(
    restored, trained_run, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(evaluate, "TIMED", 1)
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.write_text("content")
    out.mkdir()
    (out / "evaluation.json").write_text('{"gflops": 1}')  # our own
    (out / "per_class.csv").symlink_to(precious)
    (out / "confusion.png").symlink_to(precious)
    assert evaluate.main([str(trained_run), "--out", str(out)]) == 0
    assert "resnet8 (teacher)" in capsys.readouterr().out
    written = json.loads((out / "evaluation.json").read_text())
    teacher = json.loads((trained_run / "result.json").read_text())["teacher_top1"]
    assert written["resnet8 (teacher)"]["top1"] == pytest.approx(teacher)
    assert written["resnet8"]["parameters"] == sum(p.numel() for p in restored.student().parameters())
    assert (out / "per_class.csv").read_text().splitlines()[0] == "class,resnet8,resnet8 (teacher)"
    assert len((out / "confusion.csv").read_text().splitlines()) == 11
    assert (out / "confusion.png").read_bytes().startswith(b"\x89PNG")
    assert precious.read_text() == "content"


def test_a_place_that_cannot_be_written_to_is_refused_before_anything_is_computed(trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "scores", None)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/inside: cannot write there; name another place"):
        evaluate.main([str(trained_run), f"--out={tmp_path / 'file/inside'}"])


@pytest.mark.parametrize(
    ("command", "file", "words"),
    [
        (evaluate, "evaluation/confusion.csv", []),
        (evaluate, "out/evaluation.json", ["--out", "out"]),
        (export, "resnet8.pt2", []),
        (export, "out/resnet8.json", ["--out", "out/resnet8.pt2"]),
    ],
)
def test_files_of_somebody_elses_are_not_replaced(trained_run, tmp_path, monkeypatch, command, file, words):
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained_run / "ckpt/best.pth", "best.pth")
    Path(file).parent.mkdir(exist_ok=True)
    Path(file).write_text('{"mine": 1}')
    with pytest.raises(UserError, match=rf"{file}: exists already, and .*json is none of this command"):
        command.main(["best.pth", *words])
    assert Path(file).read_text() == '{"mine": 1}'


def test_a_checkpoint_that_does_not_say_what_it_is_of_needs_a_config(trained_run, tmp_path):
    bare, config = tmp_path / "bare.pth", tmp_path / "single.yml"
    torch.save({"model": read_checkpoint(trained_run / "ckpt" / "best.pth")["model"]}, bare)
    with pytest.raises(UserError, match="--config"):
        restore(bare)
    config.write_text("dataset: {name: digits}\nmodel: {name: resnet8}\ntraining: {device: cpu}\n")
    assert restore(bare, config=str(config)).student().state_dict().keys()


def test_a_folder_that_is_no_run_is_answered_with_the_runs_in_it(trained_run):
    with pytest.raises(UserError, match=f"is no run; the runs in it are .*{trained_run.name}"):
        evaluate.main([str(trained_run.parents[2])])
