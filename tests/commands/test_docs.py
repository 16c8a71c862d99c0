"""What the README and docs/ say: commands are accepted, code runs, keys, files, names and links exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from documents import DOCUMENTS, REPOSITORY, blocks, execute, launcher_variables, make_workplace, problems
from pictures import open_data
from test_advise import be_quick
from toys import toy_source

from datasets.registry import DATASETS
from distillers import DISTILLERS
from distillers.registry import LOGIT_LOSSES, POLICIES
from models import MODELS, get_model
from utils.cli import VARIABLES
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


class TestExtending:
    def block(self, beginning: str) -> str:
        (text,) = (text for text in blocks(EXTENDING, "python") if text.startswith(beginning))
        return text

    def test_the_loop_trains(self, capsys):
        execute("loop", self.block("import torch\n"))
        output = capsys.readouterr().out.splitlines()
        assert len(output) == 4  # two batches, two losses each
        assert "'loss/f1'" in output[0]
        assert "'loss/policy'" in output[1]

    def test_a_whole_run_is_one_call(self, workplace, monkeypatch):
        tiny = toy_source(torch.arange(20) % 10, "0123456789", (32, 32))
        monkeypatch.setitem(DATASETS._entries, "digits", lambda root: tiny)
        result = execute("run", self.block("from utils.config"))["result"]
        assert (workplace / "run/from-python/digits/1029/resnet8/ckpt/best.pth").exists()
        assert 0 <= result["last_top1"] <= 100

    def test_the_data_source_reads_its_files(self, workplace):
        (workplace / "data/npz").mkdir(parents=True)
        for name, count in (("train", 12), ("val", 5)):
            images = np.random.default_rng(0).integers(256, size=(count, 16, 16, 3), dtype=np.uint8)
            np.savez(workplace / f"data/npz/{name}.npz", images=images, labels=np.arange(count) % 3)
        config = find_config("npz", 1029, model="resnet8").load().dataset
        data = open_data(config.name, config.root, batch_size=5)
        assert data.source.num_classes == 3
        (batch,) = data.val.epoch(0)
        assert batch.image.shape == (5, 3, 16, 16)
        assert batch.label.tolist() == [0, 1, 2, 0, 1]
        assert [len(batch.label) for batch in data.train.epoch(0)] == [5, 5, 2]

    def test_the_network_has_its_features_and_the_config_is_that_of_the_new_data_set(self, workplace):
        network = get_model("small", num_classes=7, kwargs={"width": 4})
        assert network.feature_shapes(16, 16) == [(4, 16, 16), (8, 8, 8), (16, 4, 4), (16,)]
        config = find_config("pets", 1029, model="resnet8").load()
        assert (config.dataset.label, config.dataset.root) == ("pets", "data/pets")
        assert (config.dataset.img_h, config.dataset.img_w) == (32, 32)
        assert config.run_dir.as_posix() == "run/pets/1029/resnet8"


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
    assert listed == launcher_variables() == set(VARIABLES)


def test_the_table_of_networks_has_every_one_with_its_number_of_features():
    features = {name: int(row[2]) for row in table(RUNNING, "family") for name in re.findall(r"`([^`]+)`", row[1])}
    known = json.loads((REPOSITORY / "tests/models/model_contract.json").read_text())["models"]  # holds, by a test
    with torch.device("meta"):
        others = {name: len(get_model(name, 10).stages()) - 1 for name in set(MODELS) - set(known)}
    assert features == others | {name: len(next(iter(network["features"].values()))) for name, network in known.items()}


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


NOTEBOOK = json.loads((REPOSITORY / "docs/distil_your_own.ipynb").read_text(encoding="utf-8"))
SHORT = {
    "number % (1 + label) == 0": "number % (5 + label) == 0",
    "EPOCHS, SEEDS = 15, [1, 2]": "EPOCHS, SEEDS = 1, [1]",
    '["kd", "at"]': '["kd"]',
    'subprocess.run([sys.executable, "-m", "utils.report", "run/advice"], check=True)': (
        'from utils.report.__main__ import main as report; report(["run/advice", "--no-plots"])'
    ),
}


def test_the_notebook_makes_a_student_and_predicts_by_it(workplace, monkeypatch):
    be_quick(monkeypatch)
    code = "\n\n".join("".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code")
    for long, short in SHORT.items():
        assert long in code
        code = code.replace(long, short)
    names = {}
    exec(compile(code, "distil_your_own.ipynb", "exec"), names)
    assert set(names["table"]["training"]) == {"alone", "teacher", "kd, fixed"}
    assert len(pd.read_csv("run/predictions.csv")) == len(list((workplace / "data/my-images/four").iterdir()))
