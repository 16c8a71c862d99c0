"""docs/results.md and the README against the runs behind them: every figure comes out of docs/results/*.csv."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pandas as pd
import pytest
from documents import REPOSITORY, commands, run_python
from launchers import handed_over
from made_up_runs import write_run
from PIL import Image

from utils.config import Config, find_config
from utils.errors import UserError

sys.path.insert(0, str(REPOSITORY / "docs/results"))

import build
import fidelity
import images

RESULTS = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def runs():
    return build.read_csv(build.RUNS)


@pytest.fixture(scope="module")
def shares():
    return build.read_csv(build.SHARES)


def test_every_table_of_the_documents_comes_out_of_the_runs(runs, shares):
    made = build.tables(build.by_cell(runs), shares)
    for document in build.DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        assert "<!-- results: " in text
        assert build.filled(text, made) == text


def test_every_decimal_number_of_the_findings_stands_in_a_table():
    documents = "".join(document.read_text(encoding="utf-8") for document in build.DOCUMENTS)
    tables = "".join(re.findall(r"<!-- results: \w+ -->.*?<!-- end -->", documents, re.DOTALL))
    findings = RESULTS.split("\n## Findings\n")[1].split("<!-- results")[0]
    numbers = re.findall(r"[+-]?\d+\.\d+", re.sub(r"`[^`]*`", "", findings))
    assert len(numbers) > 10
    assert [number for number in numbers if not re.search(rf"(?<![\d.]){re.escape(number)}(?!\d)", tables)] == []


def test_the_p_values_of_a_question_are_corrected_together(runs):
    """Holm's rule in words: the smallest of n is multiplied by n, the next by n - 1; none is below the one before."""
    from scipy.stats import ttest_1samp  # whose import takes a second

    cell = {"dataset": "", "images": "", "pixels": "16x16", "teacher_weights": "", "student": "resnet8", "homo": ""}
    cell |= {"gamma": "", "routing_share": "", "precision": "", "epochs": 60, "selection": "fixed"}
    gains = {"at": (1.0, 1.1, 0.9), "sp": (1.0, 2.0, 0.2), "crd": (0.1, -0.1, 0.2)}
    rows = [
        cell | {"root": root, "distiller": name, "seed": seed, "last_top1": 70.0 + (gain if ending else 0.0)}
        for name, values in gains.items()
        for seed, gain in enumerate(values)
        for root, ending in (("run/all", ""), ("run/all-balanced", "-balanced"))
    ]
    table = build.question_table(build.by_cell(pd.DataFrame(rows)))
    plain = {name: ttest_1samp(values, 0).pvalue for name, values in gains.items()}
    expected = [plain["at"] * 3, max(plain["at"] * 3, plain["sp"] * 2), max(plain["sp"] * 2, plain["crd"])]
    assert table["p (Holm)"].tolist() == [f"**{expected[0]:.3f}**", f"{expected[1]:.3f}", f"{expected[2]:.3f}"]
    assert set(table["question"]) == {"balanced - fixed"}


def test_a_run_takes_the_place_of_the_same_run_alone(runs):
    new = runs.tail(1).assign(minutes=1.5)
    table = build.added(runs, new, build.KEYS[build.RUNS])
    assert len(table) == len(runs)
    assert table["minutes"].iloc[-1] == 1.5
    with pytest.raises(UserError, match="other results of runs in run"):
        build.added(runs, new.assign(last_top1=1.5), build.KEYS[build.RUNS])


def test_the_command_of_a_run_starts_that_very_run(runs):
    """The launcher hands it to Python, which makes the config of which the line tells; one run of each kind."""
    for line in runs.drop_duplicates(["root", "selection", "distiller"]).to_dict("records"):
        ((variables, words),) = commands(line["command"])
        (config,) = run_python(handed_over(*words[1:], **variables))
        known = settings(config)
        assert known == {name: line[name] for name in known}


def settings(config: Config) -> dict[str, object]:
    """What runs.csv says of a run before it is trained."""
    kd = config.kd
    known = {
        "root": str(config.run.root),
        "dataset": config.dataset.label,
        "images": str(config.dataset.root),
        "pixels": f"{config.dataset.img_h}x{config.dataset.img_w}" if config.dataset.img_h else "",
        "student": config.student.name,
        "seed": config.training.seed,
        "epochs": config.training.epochs,
        "precision": config.training.precision,
    }
    if kd:
        known |= {"teacher": kd.teacher.name, "teacher_weights": kd.teacher.checkpoint or ""}
        known |= {"distiller": config.kd_loss.name, "selection": kd.selection}
        known |= {"homo": str(config.kd_loss.homo).lower()}
    if kd and kd.selection in ("adaptive", "anti"):
        known |= {"gamma": str(kd.loss_weights.classify_weight), "routing_share": str(kd.routing_share)}
    return known


def test_runs_that_are_no_repetitions_are_refused(runs):
    cell = runs[(runs["root"] == "run/all") & (runs["distiller"] == "at") & (runs["selection"] == "fixed")]
    with pytest.raises(UserError, match="have the same seed"):
        build.by_cell(cell.assign(seed=1))
    with pytest.raises(UserError, match="differ in epochs"):
        build.by_cell(cell.assign(epochs=range(len(cell))))


def test_the_files_are_made_of_the_finished_runs_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run("run", selection="adaptive", epochs=3, done=2, seed=1)
    with pytest.raises(UserError, match="run: no finished run"):
        build.collect([Path("run")])
    write_run("run", selection="adaptive", epochs=3, seed=2, accuracies=[1, 2, 70.125])
    for table, known in zip(build.collect([Path("run")]), (build.RUNS, build.SHARES)):
        table.to_csv(known.name, index=False)
        assert list(table)[:8] == list(build.read_csv(known))[:8]
    runs, shares = build.read_csv(Path("runs.csv")), build.read_csv(Path("shares.csv"))
    (line,) = runs.to_dict("records")
    assert (line["seed"], line["epochs"], line["distiller"], line["last_top1"]) == (2, 3, "at", 70.12)
    assert shares["spot"].tolist() == ["f1", "f2", "f3", "logits"]
    assert shares[["1", "2", "3"]].iloc[3].tolist() == pytest.approx([76.7, 53.3, 30.0])


def test_the_figures_are_drawn(runs, shares):
    assert len(build.accuracy_figure(build.by_cell(runs)).axes) == len(build.TEACHERS)
    assert len(build.share_figure(shares).axes[0].lines) == 20


def test_the_small_set_has_the_first_images_of_each_class_and_all_test_images(tmp_path, monkeypatch):
    class Downloaded(list):
        classes = ("cat", "dog")

        def __init__(self, root, train, download):
            labels = [1, 0, 1, 1] if train else [0]
            super().__init__((Image.new("RGB", (2, 2), (k, 0, 0)), label) for k, label in enumerate(labels))

    monkeypatch.setattr(images, "CIFAR10", Downloaded)
    images.write_images(tmp_path / "few", 2)
    files = {str(file.relative_to(tmp_path)): Image.open(file) for file in tmp_path.rglob("*.png")}
    names = ["test/cat/0000", "train/cat/0000", "train/dog/0000", "train/dog/0001"]
    assert sorted(files) == [f"few/{name}.png" for name in names]
    assert files["few/train/dog/0001.png"].getpixel((0, 0)) == (2, 0, 0)


def test_the_step_that_is_compared_with_the_published_code_is_ours():
    config = find_config("cifar-100", 1029, teacher="resnet14", student="resnet8", distiller="crd")
    case = fidelity.make_case(config.load(["training.batch_size=4", "training.channels_last=false"]), samples=200)
    before = {n: [x.clone() for x in xs] for n, xs in fidelity.tensors_by_published_name(case.task).items()}
    changed = fidelity.changes(fidelity.our_step(case), before)
    moved = {name for name, values in changed.items() if any(value.abs().sum() > 0 for value in values)}
    assert {"module.student", "module.policy"} <= moved
    assert "module.teacher" not in moved
