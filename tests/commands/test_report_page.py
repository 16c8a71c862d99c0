"""The page of the report and its figures."""

import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from made_up_runs import BETA, write_run, write_samples
from pictures import image_folder

from datasets.source import Files, Source
from utils.report import build, style
from utils.report.__main__ import main
from utils.report.curves import (
    accuracy_figure,
    accuracy_limits,
    contributions,
    cross_entropy_figure,
    loss_figure,
    share_figure,
)
from utils.report.gallery import extremes, gallery_figure
from utils.report.groups import grouped
from utils.report.heatmaps import class_heatmap, confusion_figure
from utils.report.student import confusion_of, count_figure, predict, worst
from utils.run_folder.read import find_runs, read_run

LONG_NAME = "a class whose name is longer than twenty-two letters"
SPOTS = ["f1", "f2", "f3", "logits"]


@pytest.fixture(autouse=True)
def _coarse_pixels(monkeypatch):
    monkeypatch.setattr(style, "DPI", 20)


def texts_of(labels):
    return [label.get_text() for label in labels]


def figures_in(out):
    return {re.sub(r"-\d+$", "", file.stem) for file in (out / "figures").iterdir()}


def test_weighted_terms_of_the_loss_add_up_to_the_total(tmp_path):
    folder = write_run(tmp_path, selection="adaptive")
    terms = contributions(read_run(folder))
    assert list(terms) == ["loss/total", "loss/ce", "loss/kl", "loss/f1", "loss/f2", "loss/f3"]
    np.testing.assert_allclose(terms.drop(columns="loss/total").sum(axis="columns"), terms["loss/total"])
    facts = json.loads((folder / "facts.json").read_text())
    facts["weights"]["loss/f1"] = [BETA, 2]  # a weight that grows over two epochs
    (folder / "facts.json").write_text(json.dumps(facts))
    run = read_run(folder)
    expected = BETA * run.curve("train.loss/f1") * [0.5, 1, 1, 1]
    np.testing.assert_allclose(contributions(run)["loss/f1"], expected)
    balanced = read_run(folder)
    for record in balanced.records:
        record["train"]["weight/f1"] = 0.25
    np.testing.assert_allclose(contributions(balanced)["loss/f1"], 0.25 * expected)
    legend = loss_figure(run).axes[0].get_legend()
    assert {"total", "cross-entropy", "beta * distiller at f1"} <= set(texts_of(legend.get_texts()))


def test_curves_are_those_of_the_records_on_one_scale(tmp_path):
    for seed, top1 in ((1, 70.0), (2, 60.0)):
        write_run(tmp_path, selection="adaptive", seed=seed, accuracies=[20, 50, 60, top1], done=4 - (seed == 2))
        write_run(tmp_path, selection="fixed", seed=seed, distiller="sp", accuracies=[20, 80, 85, 90])
    runs = find_runs([tmp_path])
    groups = grouped(runs)
    figure = accuracy_figure(groups, accuracy_limits(runs))
    first, second = figure.axes
    assert list(first.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(first.lines[0].get_ydata()) == [20, 50, 60, 70]
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[0] < 50 < 90 < first.get_ylim()[1]
    assert texts_of(figure.legends[0].get_texts()) == ["fixed", "adaptive", "teacher", "unfinished"]
    run = groups[0].first
    gates = share_figure(groups[:1]).axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(gates, run.curve("train.gate/f2") * 100)
    training, validation = cross_entropy_figure(groups).axes[0].lines[:2]
    np.testing.assert_allclose(training.get_ydata(), run.curve("train.loss/ce"))
    np.testing.assert_allclose(validation.get_ydata(), run.curve("val.loss/total"))


@pytest.mark.parametrize("classes", [2, 1000])
def test_heatmaps_stay_readable_and_cut_no_name(classes, tmp_path):
    run = read_run(write_run(tmp_path, selection="adaptive", num_classes=classes))
    names = [f"{LONG_NAME} {k}" for k in range(classes)]
    gates, confusion = (
        class_heatmap(run.gate_shares(), names, "t"),
        confusion_figure(np.eye(classes, dtype=int), names, "t"),
    )
    for figure in (gates, confusion):
        assert figure.get_figheight() < 16
        assert len(figure.axes[0].get_yticklabels()) <= 60
    assert set(texts_of(gates.axes[0].get_yticklabels())) <= set(names)
    assert texts_of(confusion.axes[0].get_xticklabels())[0] == names[0]


def test_the_numbers_of_a_heatmap_are_its_counts_or_shares(tmp_path):
    panel = confusion_figure(np.array([[7, 3], [0, 1200]]), ("a", "b"), "t").axes[0]
    assert texts_of(panel.get_yticklabels()) == ["a (10)", "b (1,200)"]
    assert texts_of(panel.texts) == ["7", "3", "1200"]
    folder = write_run(tmp_path, selection="adaptive", num_classes=2)
    line = {"global_epoch": 4, "gates": ["f1", "logits"], "classes": [[0.5, 1.0], [None, None]]}
    (folder / "gates.jsonl").write_text(json.dumps(line) + "\n")
    assert texts_of(class_heatmap(read_run(folder).gate_shares(), None, "t").axes[0].texts) == ["50", "100"]


def test_the_gallery_picks_extremes_and_spreads_its_choice_among_equals():
    frequency = np.array([0.5, 0.9, 0.1, 1.0, 0.0, 0.5])
    assert extremes(frequency, 2, most=True).tolist() == [3, 1]
    assert extremes(frequency, 2, most=False).tolist() == [4, 2]
    frequency = np.ones(100)
    frequency[50] = 0
    assert extremes(frequency, 4, most=True).tolist() == [0, 24, 49, 75]
    assert extremes(frequency, 4, most=False).tolist() == [50], "one that was always distilled is none of the least"
    assert extremes(np.ones(100), 4, most=True).size == 0


def test_the_gallery_shows_the_chosen_images_and_a_blank_for_one_that_is_gone(tmp_path):
    image_folder(tmp_path, train=4, val=1, classes=("x",), size=(8, 8))
    files = [tmp_path / f"train/x/00{k}.png" for k in range(4)]
    split = Files(files, [0] * 4)
    source = Source(split, split, (LONG_NAME,), (0.5,) * 3, (0.5,) * 3, None, (8, 8))
    expected = np.asarray(split.picture(3))
    files[1].unlink()
    folder = write_run(tmp_path / "run", selection="adaptive")
    write_samples(folder, 1, np.array([[0, 0], [1, 0], [0, 0], [1, 0]]), ["f1", "logits"])
    most, _, logits, _ = gallery_figure(read_run(folder).gate_samples(), source, "a run").axes
    shown = most.images[0].get_array()
    assert (shown[:, :64] == 255).all()
    assert (shown[::8, 68:132:8] == expected).all(), "sample 3 beside it, each pixel eight times as large"
    assert "cannot\nbe read" in texts_of(most.texts)
    assert "equally often (0 %)" in logits.get_title(loc="left")
    assert LONG_NAME in most.texts[-1].get_text().replace("-\n", "-").replace("\n", " ")


def test_the_gallery_waits_for_ten_epochs_and_says_why_it_is_not_there(tmp_path):
    (image_folder(tmp_path / "images", train=12, val=1) / "train").rename(tmp_path / "own")
    data = {"name": "imagefolder", "label": "own", "root": str(tmp_path / "own"), "val_split": 0.25}
    keys = {"distiller": "kd", "num_classes": 2, "settings": {"dataset": data}}
    folder = write_run(tmp_path / "run", selection="adaptive", **keys)

    def detail(epochs):
        write_samples(folder, epochs, np.random.default_rng(0).integers(0, 9, (18, 1)), ["logits"])
        build._load_source.cache_clear()
        (section,) = build.detail_sections([read_run(folder)], tmp_path, with_images=True)
        return section.texts[-1], any("gallery" in figure.name for figure in section.figures)

    text, is_shown = detail(9)
    assert ("so far 9" in text, is_shown) == (True, False)
    assert detail(10)[1]
    (tmp_path / "own/bee/000.png").unlink()
    text, is_shown = detail(11)
    assert (f"{tmp_path / 'own'} does not hold exactly the 18 images" in text, is_shown) == (True, False)


def test_the_page_is_self_contained_links_to_every_run_and_takes_names_for_text(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "DETAILS", 1)
    runs, out = tmp_path / "my run", tmp_path / "out"
    folder = write_run(runs, selection="adaptive")
    write_samples(folder, 10, np.random.default_rng(0).integers(0, 5, (776, 4)), SPOTS)
    write_run(runs, selection="fixed", done=1)
    config = write_run(runs, selection="fixed", distiller="sp", epochs=1) / "config.yml"
    config.write_text(config.read_text().replace("label: null", "label: '<b>$x^{'", 1))
    write_run(runs, selection="anti", dataset="cifar-100", teacher="vgg13", student="vgg8", done=0)
    write_run(runs, selection="single", student="resnet8")
    assert main([str(runs), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "stopped 1/4" in page
    assert "stopped 0/4" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    folders = {source for source in sources if not source.startswith(("#", "data:"))}
    linked = {(out / folder.replace("%20", " ")).resolve() for folder in folders}
    assert linked == {run.path for run in find_runs([runs])}
    assert not re.search(r"url\(|@import", page)
    assert ("<b>$x^{" in page, "&lt;b&gt;$x^{" in page) == (False, True)
    parts = ("accuracy-and-cost", "accuracy", "cross-entropy", "gate-shares")
    of_run = {f"run-001-resnet20-resnet8-at-adaptive-seed-1029-{part}" for part in ("losses", "classes", "gallery")} | {
        "digits-gate-shares"
    }
    assert figures_in(out) == {f"digits-{part}" for part in parts} | of_run
    assert "## Results on digits" in capsys.readouterr().out
    assert main([str(runs), "--out", str(out), "--no-plots"]) == 0
    assert {file.name for file in out.iterdir() if file.is_file()} == {"report.md", "results.csv", "runs.csv"}


def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_drawn(tmp_path, monkeypatch, caplog):
    run = read_run(write_run(tmp_path, selection="adaptive"))
    monkeypatch.setattr(build, "loss_figure", lambda run: 1 / 0)
    (section,) = build.detail_sections([run], tmp_path, with_images=False)
    assert [figure.name.split("-")[-2] for figure in section.figures] == ["classes"]
    assert "losses failed: ZeroDivisionError" in caplog.text


def test_predictions_are_counted_and_the_most_certain_mistakes_come_first():
    found = pd.DataFrame({"label": [0, 1, 2, 2], "predicted": [0, 2, 2, 0], "certainty": [0.9, 0.6, 0.8, 0.7]})
    assert worst(found, 5).index.tolist() == [3, 1]
    confusion = confusion_of(found, 3)
    assert confusion.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 1]]
    panel = count_figure(confusion, ("a", "b", "c"), "t").axes[0]
    assert texts_of(panel.get_yticklabels()) == ["c", "a", "b"], "the most frequent class first"
    assert [bar.get_width() for bar in panel.patches] == [2, 1, 1, 2, 2, 0]


def test_the_best_student_is_shown_with_its_confusions_and_mistakes(trained_run, tmp_path, caplog):
    run = read_run(shutil.copytree(trained_run, tmp_path / "run"))
    source = build.load_source(run)
    predictions = predict(run, source)
    assert predictions["label"].tolist() == source.val.labels.tolist()
    assert 100 * (predictions["label"] == predictions["predicted"]).mean() == pytest.approx(run.best_top1, abs=0.01)
    (section,) = build.student_sections("x", grouped([run]))
    assert [figure.name for figure in section.figures] == ["x-confusion-1", "x-class-counts-1", "x-mistakes-1"]
    (run.path / "ckpt" / "best.pth").write_bytes(b"")
    assert build.student_sections("x", grouped([run])) == []
    assert "its confusions are left out" in caplog.text
