"""docs/results.md and the README against the runs behind them: every figure comes out of docs/results/*.csv."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from documents import REPOSITORY, commands, run_python
from launchers import handed_over
from made_up_runs import write_run
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
    """What runs.csv says of a run before it is trained."""
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
        "dataset": config.dataset.label,
        "images": str(config.dataset.root),
        "pixels": result_lines.pixels(config.dataset.model_dump()),
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


@pytest.mark.parametrize("there", ["", "given/train/cat", "given/test/dog"])
def test_a_folder_without_the_same_classes_twice_is_refused_before_anything_is_written(there, tmp_path, monkeypatch):
    for folder in ("given/train/cat", "given/test/dog", there):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    if there:
        (tmp_path / there / "0.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images.py", "given"])
    with pytest.raises(UserError, match=r"given: must have train/<class>/ and test/<class>/ with images"):
        images.main()
    assert not (tmp_path / "data").exists()


def test_images_that_are_there_are_not_mixed_with_others(tmp_path, monkeypatch):
    for folder in ("given/train/cat", "given/test/cat", "data/cifar-10"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "0.jpg").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["images.py", "given"])
    with pytest.raises(UserError, match="data/cifar-10: is there already"):
        images.main()
    assert names(tmp_path / "data") == ["cifar-10/0.jpg"]


def test_runs_that_are_no_repetitions_are_refused(lines):
    one, two, *_ = result_lines.where(lines, root="run/all", distiller="at", selection="fixed")
    with pytest.raises(UserError, match="have the same seed"):
        result_lines.last([one, replace(two, seed=one.seed)], root="run/all")
    with pytest.raises(UserError, match="differ in epochs"):
        result_lines.last([one, replace(two, epochs=5)], root="run/all")


def test_a_newer_distiller_has_a_place_in_its_tables(lines, shares):
    old = {"root": "run/all", "distiller": "sp"}
    lines = [replace(line, distiller="dkd") for line in result_lines.where(lines, **old)] + lines[:3]
    shares = [replace(entry, distiller="dkd") for entry in result_lines.where(shares, **old)]
    for name in ("distillers", "choices"):
        assert "| DKD " in build.filled(f"<!-- results: {name} -->\n<!-- end -->", lines, shares)


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("<!-- results: other -->\n<!-- end -->", "other: no such table"),
        ("<!-- results: main -->\ntext", "has no <!-- end -->"),
        ("<!-- results: main -->\ntext\n<!-- results: main -->\n<!-- end -->", "has no <!-- end -->"),
    ],
)
def test_a_mark_that_is_wrong_is_named(document, complaint, lines, shares):
    with pytest.raises(UserError, match=complaint):
        build.filled(document, lines, shares)


def test_a_table_without_runs_is_named(shares):
    with pytest.raises(UserError, match="main: there are no runs"):
        build.filled("<!-- results: main -->\n<!-- end -->", [], shares)


def test_a_column_that_is_missing_is_named(tmp_path, monkeypatch):
    text = result_lines.RUNS.read_text(encoding="utf-8").replace(",epochs,", ",epoch,", 1)
    (tmp_path / "runs.csv").write_text(text, encoding="utf-8")
    monkeypatch.setattr(result_lines, "RUNS", tmp_path / "runs.csv")
    with pytest.raises(UserError, match=r"runs.csv: line 2, epochs: Field required"):
        result_lines.read_lines()


def test_the_files_are_made_of_the_finished_runs_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(result_lines, "RUNS", tmp_path / "runs.csv")
    monkeypatch.setattr(result_lines, "SHARES", tmp_path / "shares.csv")
    monkeypatch.chdir(tmp_path)
    write_run("run", selection="adaptive", epochs=3, done=2, seed=1)
    with pytest.raises(UserError, match="run: no finished run"):
        result_lines.collect([Path("run")])
    write_run("run", selection="adaptive", epochs=3, seed=2)
    collected = result_lines.collect([Path("run")])
    result_lines.write_csv_files(*collected)
    (line,), shares = result_lines.read_lines(), result_lines.read_shares()
    assert ([line], shares) == collected
    assert (line.seed, line.epochs, line.distiller, line.selection) == (2, 3, "at", "adaptive")
    assert {entry.seed for entry in shares} == {2}
    assert all(set(entry.by_epoch) == {1, 2, 3} for entry in shares)
