"""docs/results.md and the README against the runs behind them: every figure comes out of docs/results/*.csv."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
from documents import REPOSITORY, commands, run_python
from launchers import handed_over
from PIL import Image

from utils.config import Config
from utils.errors import UserError

sys.path.insert(0, str(REPOSITORY / "docs/results"))

import build
import images
import result_lines

RESULTS = REPOSITORY / "docs/results.md"


@pytest.fixture(scope="module")
def lines():
    return result_lines.read_lines()


@pytest.fixture(scope="module")
def shares():
    return result_lines.read_shares()


@pytest.mark.parametrize("name", ["docs/results.md", "README.md"])
def test_every_table_of_a_document_comes_out_of_the_runs(name, lines, shares):
    document = (REPOSITORY / name).read_text(encoding="utf-8")
    assert "<!-- results: " in document
    assert build.filled(document, lines, shares) == document


def test_another_accuracy_changes_the_table(lines, shares):
    document = RESULTS.read_text(encoding="utf-8")
    changed = [replace(line, last_top1=line.last_top1 + 0.5 * (line.distiller == "at")) for line in lines]
    assert build.filled(document, changed, shares) != document


def test_the_command_of_a_run_starts_that_very_run(lines):
    """The launcher hands it to Python, which makes the config of which the line tells."""
    for line in lines:
        ((_, variables, words),) = commands(line.command)
        (config,) = run_python(handed_over(*words[1:], **variables))
        assert settings(config) == {name: getattr(line, name) for name in settings(config)}


def settings(config: Config) -> dict[str, object]:
    """What results.csv says of a run before it is trained."""
    kd = config.kd
    distilled = kd and {
        "teacher": kd.teacher.name,
        "teacher_weights": kd.teacher.checkpoint or "",
        "distiller": config.kd_loss.name,
        "selection": kd.selection,
        "homo": str(config.kd_loss.homo).lower(),
    }
    with_policy = kd and kd.selection in ("adaptive", "anti")
    policy = with_policy and {"gamma": str(kd.loss_weights.classify_weight), "routing_share": str(kd.routing_share)}
    return {
        "root": str(config.run.root),
        "images": str(config.dataset.root),
        "student": config.student.name,
        "seed": config.training.seed,
        "epochs": config.training.epochs,
        "precision": config.training.precision,
        **(distilled or {}),
        **(policy or {}),
    }


def names(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_the_small_set_has_the_first_images_of_each_class_and_all_test_images(tmp_path, monkeypatch):
    for split, count in (("train", images.PER_CLASS + 2), ("test", 3)):
        (tmp_path / "given" / split / "cat").mkdir(parents=True)
        for number in range(count):
            (tmp_path / "given" / split / "cat" / f"{number:04}.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images.py", "given"])
    images.main()
    assert names(tmp_path / "data/cifar-10") == names(tmp_path / "given")
    first = [f"train/cat/{number:04}.jpg" for number in range(images.PER_CLASS)]
    assert names(tmp_path / "data/cifar-10-mini") == [
        "test/cat/0000.jpg",
        "test/cat/0001.jpg",
        "test/cat/0002.jpg",
        *first,
    ]


def test_torchvisions_images_are_numbered_within_their_class(tmp_path, monkeypatch):
    class Downloaded(list):
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            labels = (1, 0, 1) if train else (0,)
            super().__init__(
                (Image.new("RGB", (2, 2), (50 * number, 0, 0)), label) for number, label in enumerate(labels)
            )

    monkeypatch.setattr(images, "CIFAR10", Downloaded)
    images.write_images(tmp_path / "out", tmp_path)
    assert names(tmp_path / "out") == [
        "test/cat/0000.png",
        "train/cat/0000.png",
        "train/dog/0000.png",
        "train/dog/0001.png",
    ]
    assert Image.open(tmp_path / "out/train/dog/0001.png").getpixel((0, 0)) == (100, 0, 0)


def test_a_folder_without_images_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    (tmp_path / "given/train").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images.py", "given"])
    with pytest.raises(UserError, match="given: no folder test/ in it"):
        images.main()
    assert not (tmp_path / "data").exists()
