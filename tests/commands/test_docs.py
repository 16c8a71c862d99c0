"""What the README and docs/ say: commands are accepted, code runs, keys, files, names and links exist."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from documents import DOCUMENTS, REPOSITORY, blocks, execute, launcher_variables, make_workplace, problems, run_python

from datasets import build_data
from datasets.registry import DATASETS
from datasets.source import Arrays, Source
from distillers import DISTILLERS
from distillers.registry import LOGIT_LOSSES, POLICIES
from models import MODELS, get_model
from utils.config import find_config
from utils.run_folder.layout import Layout

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
EXTENDING = (REPOSITORY / "docs/extending.md").read_text(encoding="utf-8")
RUNNING = (REPOSITORY / "docs/running.md").read_text(encoding="utf-8")


REGISTRIES = (DATASETS, DISTILLERS, LOGIT_LOSSES, MODELS, POLICIES)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with the files that the documents show, and what the registries then hold."""
    folder = tmp_path_factory.mktemp("checkout")
    with pytest.MonkeyPatch.context() as patch:
        for registry in REGISTRIES:
            patch.setattr(registry, "_entries", {name: registry.get(name) for name in registry})
        make_workplace(folder)
        return folder, [registry._entries for registry in REGISTRIES]


@pytest.fixture
def workplace(checkout, monkeypatch):
    """The checkout, as the current directory."""
    folder, contents = checkout
    for registry, entries in zip(REGISTRIES, contents):
        monkeypatch.setattr(registry, "_entries", entries)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_what_a_document_says_holds(document, workplace):
    assert problems(document.read_text(encoding="utf-8"), workplace, document.parent) == []


@pytest.mark.parametrize(
    ("language", "text", "complaint"),
    [
        ("sh", "sh train_sngle.sh", "unknown command"),
        ("sh", "datset=digits sh train.sh", "no launcher has a variable datset"),
        ("sh", "dataset=digits net2=resnet9 sh train.sh", "unknown model 'resnet9'"),
        ("sh", "dataset=digits sh train.sh --resumed", "unrecognized arguments: --resumed"),
        ("sh", "dataset=digits sh train.sh \\\n    training.epoch=3", "unknown key training.epoch"),
        ("sh", "dataset=digits teacher_args='training.epoch=3' sh train.sh", "unknown key training.epoch"),
        ("sh", "sh train.sh --config configs/digits/seed-1029/at/vgg13-vgg9.yml", "vgg13-vgg9.yml: no such file"),
        ("sh", "sh test.sh -m quick", "no such test or marker"),
        ("sh", "dataset=digits\nsh train.sh", "sets variables for no command"),
        ("sh", "conda install torch", "unknown command conda"),
        ("sh", "python -m utils.reports run", "No module named utils.reports"),
        ("sh", "python -m utils.report --no-pictures", "unrecognized arguments: --no-pictures"),
        ("sh", "torchrun --nproc-pernode 4 train.py --dataset digits", "--nproc-pernode"),
        ("", "`dataset=digits sh train.sh training.epoch=3`", "unknown key training.epoch"),
        ("", "`training.epoch`", "no such key"),
        ("", "`configs/<dataset>/seed-1030/<distiller>/<net1>-<net2>.yml`", "no such file"),
        ("", "`utils.report.curves.loss_figures`", "utils.report.curves has no loss_figures"),
        ("yaml", "model: {name: mynets.MyNet, stage: [[conv1]]}", "no such key model.stage"),
        ("", "[link](docs/method.md#notations)", "no such heading"),
        ("", "a formula $a_k$ that GitHub may spoil", "write formulas as"),
    ],
)
def test_a_misspelt_word_is_found(language, text, complaint, workplace):
    """In a code block, or in a sentence."""
    document = f"before\n```{language}\n{text}\n```\nafter\n" if language else f"before\n\nsee {text} there\n"
    (found,) = problems(document, workplace)
    assert found.startswith(("line 3: ", "line 4: "))
    assert complaint in found


def test_a_document_that_tells_to_install_something_installs_nothing(workplace):
    assert run_python(["-m", "pip", "install", "no-such-package-anywhere"]) == []


def test_code_blocks_look_like_the_rest_of_the_code(tmp_path):
    (tmp_path / "pyproject.toml").write_text((REPOSITORY / "pyproject.toml").read_text())
    for document in DOCUMENTS:
        for block in blocks(document.read_text(encoding="utf-8"), "python"):
            (tmp_path / f"{document.stem}_{block.line}.py").write_text(block.text)
    assert list(tmp_path.glob("extending_*.py"))
    for command in (["check"], ["format", "--diff"]):
        run = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "."], cwd=tmp_path, capture_output=True, text=True
        )
        assert run.returncode == 0, run.stdout


class TestExtending:
    def block(self, beginning: str) -> str:
        (text,) = (block.text for block in blocks(EXTENDING, "python") if block.text.startswith(beginning))
        return text

    def test_the_loop_trains_student_and_policy_and_leaves_the_teacher_alone(self, capsys, monkeypatch):
        started = {}
        monkeypatch.setattr(
            "distillers.spot_adaptive.distillation.SpotAdaptiveDistillation.train",
            lambda task: started.update({key: value.clone() for key, value in task.state_dict().items()}) or task,
        )
        text = self.block("import torch\n")
        found = execute("loop", text)
        assert len(text.partition("\nimages")[2].splitlines()) <= 20
        assert set(re.findall(r"^from (\w+)", text, re.MULTILINE)) == {"torch", "distillers"}
        task, student = found["task"], found["student"]
        assert all(ours is theirs for ours, theirs in zip(task.student.parameters(), student.parameters(), strict=True))
        changed = {
            key.split(".")[0] for key, value in task.state_dict().items() if not torch.equal(value, started[key])
        }
        assert changed == {"student", "policy", "router"}
        output = capsys.readouterr().out.splitlines()
        assert len(output) == 4  # two batches, two losses each
        assert "'loss/f1'" in output[0]
        assert "'loss/policy'" in output[1]

    def test_a_whole_run_is_one_call(self, workplace, monkeypatch):
        images, labels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.arange(20) % 10
        part, half = Arrays(images, labels), (0.5, 0.5, 0.5)
        tiny = Source(part, part, tuple("0123456789"), half, half, augment="crop", image_size=(32, 32))
        monkeypatch.setitem(DATASETS._entries, "digits", lambda root: tiny)
        result = execute("run", self.block("from utils.config"))["result"]
        assert (workplace / "run/from-python/digits/1029/resnet8/ckpt/best.pth").exists()
        assert 0 <= result["last_top1"] <= 100

    def test_the_data_source_reads_its_files(self, workplace):
        (workplace / "data/npz").mkdir(parents=True)
        for name, count in (("train", 12), ("val", 5)):
            images = np.random.default_rng(0).integers(256, size=(count, 16, 16, 3), dtype=np.uint8)
            np.savez(workplace / f"data/npz/{name}.npz", images=images, labels=np.arange(count) % 3)
        config = find_config("npz", 1029, model="resnet8").load()
        sizes = {"batch_size": 4, "val_batch_size": 5, "num_workers": 0, "val_num_workers": 0}
        data = build_data(config.dataset, **sizes, seed=1, device="cpu")
        assert data.num_classes == 3
        (batch,) = data.val.epoch(0)
        assert batch.image.shape == (5, 3, 16, 16)
        assert batch.label.tolist() == [0, 1, 2, 0, 1]
        assert {len(batch.label) for batch in data.train.epoch(0)} == {4}

    def test_the_network_has_the_features_that_it_says(self, workplace):
        network = get_model("small", num_classes=7, kwargs={"width": 4})
        assert network.feature_shapes(16, 16) == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (16,)]

    def test_the_config_made_of_another_is_that_of_the_new_data_set(self, workplace):
        config = find_config("pets", 1029, model="resnet8").load()
        assert (config.dataset.label, config.dataset.root) == ("pets", "data/pets")
        assert (config.dataset.img_h, config.dataset.img_w) == (32, 32)
        assert config.run_dir.as_posix() == "run/pets/1029/resnet8"

    def test_at_most_four_files_are_to_be_read(self):
        rows = re.findall(r"^\|[^|]+\|([^|]+)\|([^|]+)\|$", EXTENDING, re.MULTILINE)[2:]
        assert len(rows) == 8
        for _, read in rows:
            assert 1 <= len(re.findall(r"`[\w/]+\.py`", read)) <= 4


def table(document: str, first_heading: str) -> list[list[str]]:
    """Rows of the table whose first column is headed so."""
    rows = re.search(rf"^\| {re.escape(first_heading)} \|.*\n(?:\|.*\n)+", document, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_the_table_of_distillers_has_every_one_with_its_weight():
    shown = {name.strip("`"): weight for name, _, _, weight, *_ in table(README, "`distiller=`")}
    kinds = {name: DISTILLERS.get(name) for name in DISTILLERS}
    expected = {name: None if kind.logits_only else kind.default_weight for name, kind in kinds.items()}
    assert {name: None if weight == "–" else float(weight) for name, weight in shown.items()} == expected  # noqa: RUF001


def test_every_variable_of_the_launchers_is_listed():
    listed = {name for row in table(RUNNING, "variable") for name in re.findall(r"\w+", row[0])}
    assert listed == launcher_variables()


def test_the_table_of_networks_has_every_one_with_its_number_of_features():
    features = {name: int(row[2]) for row in table(RUNNING, "family") for name in re.findall(r"`([^`]+)`", row[1])}
    with torch.device("meta"):
        assert features == {name: len(get_model(name, 10).stages()) - 1 for name in MODELS}


def test_all_that_a_run_leaves_is_listed():
    _, section = RUNNING.split("\n## What a run leaves\n")
    cells = [row.split("|")[1] for row in section.split("\n## ")[0].splitlines() if row.startswith("| `")]
    listed = re.findall(r"`([\w./]+)`", " ".join(cells))
    run = Layout(Path())
    assert {Path(name) for name in listed} >= set(vars(run).values()) - {run.path, run.checkpoints, run.lock}


@pytest.mark.parametrize("script", [*REPOSITORY.glob("*.sh"), REPOSITORY / ".ci/run"], ids=lambda path: path.name)
def test_files_that_a_script_mentions_exist(script):
    words = re.findall(r"(?<![\w./-])[\w-]+(?:/[\w-]+)*\.(?:py|sh|txt)\b", script.read_text(encoding="utf-8"))
    assert [word for word in words if not (REPOSITORY / word).exists()] == []


class TestPicture:
    COMMITTED = REPOSITORY / "docs/routing.svg"

    @pytest.fixture(scope="class")
    @classmethod
    def drawn(cls, tmp_path_factory):
        folder = tmp_path_factory.mktemp("picture")
        draw = runpy.run_path(str(REPOSITORY / "docs/draw_routing.py"))["main"]
        draw(folder / "first.svg")
        draw(folder / "second.svg")
        return folder

    def test_is_drawn_the_same_every_time(self, drawn):
        assert (drawn / "first.svg").read_bytes() == (drawn / "second.svg").read_bytes()

    def test_is_what_its_script_draws(self, drawn):
        """Matplotlib leaves every text as a comment; the outlines themselves vary with its version."""

        def content(file):
            svg = file.read_text(encoding="utf-8")
            return re.findall(r"<!-- (.*?) -->", svg, re.DOTALL), len(re.findall("<path", svg))

        assert content(self.COMMITTED)[0] == content(drawn / "first.svg")[0]
        assert "policy" in content(self.COMMITTED)[0]

    def test_has_a_white_background_also_where_the_page_is_dark(self):
        first_shape = re.search(r"<path [^>]*>", self.COMMITTED.read_text(encoding="utf-8"))[0]
        assert "fill: #ffffff" in first_shape
