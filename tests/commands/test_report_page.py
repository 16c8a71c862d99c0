"""The page of the report and its figures."""

import json
import re

import numpy as np
import pytest
import torch
from made_up_runs import BETA, write_run, write_samples
from pictures import image_folder
from PIL import Image
from trained_pair import trained_pair

from datasets.source import Arrays, Files, Source
from utils.report import build
from utils.report.__main__ import main
from utils.report.confusion import confusion_figure
from utils.report.curves import accuracy_figures, cross_entropy_figures, difference_figures
from utils.report.gallery import extremes, gallery_figure
from utils.report.gate_plots import class_heatmap, share_figures
from utils.report.groups import grouped
from utils.report.losses import contributions, loss_figure
from utils.report.student import Predictions, class_figure, mistakes_figure, predict
from utils.report.style import png
from utils.run_folder.read import find_runs, read_run

LONG_NAME = "a class whose name is longer than twenty-two letters"
SPOTS = ["f1", "f2", "f3", "logits"]


def texts_of(labels):
    return [label.get_text() for label in labels]


def source_of(split, *names):
    return Source(split, split, names, (0.5,) * 3, (0.5,) * 3, None, (8, 8))


def test_terms_of_the_loss_with_their_weights_add_up_to_the_total(tmp_path):
    run = read_run(write_run(tmp_path, selection="adaptive"))
    terms = contributions(run)
    assert list(terms) == ["loss/total", "loss/ce", "loss/kl", "loss/f1", "loss/f2", "loss/f3"]
    np.testing.assert_allclose(terms.drop(columns="loss/total").sum(axis="columns"), terms["loss/total"])
    panel = loss_figure(run).axes[0]
    assert {"total", "cross-entropy", "beta * distiller at f1"} <= set(texts_of(panel.get_legend().get_texts()))


def test_a_weight_that_grows_over_the_first_epochs_is_shown_growing(tmp_path):
    folder = write_run(tmp_path, selection="adaptive")
    facts = json.loads((folder / "facts.json").read_text())
    facts["weights"]["loss/f1"] = [BETA, 2]
    (folder / "facts.json").write_text(json.dumps(facts))
    run = read_run(folder)
    np.testing.assert_allclose(contributions(run)["loss/f1"], BETA * run.curve("train.loss/f1") * [0.5, 1, 1, 1])


def test_all_panels_of_accuracy_have_one_scale(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, selection="fixed", seed=seed, accuracies=[20, 50, 60, 70])
        write_run(tmp_path, selection="fixed", seed=seed, distiller="sp", accuracies=[20, 80, 85, 90])
    (figure,) = accuracy_figures(grouped(find_runs([tmp_path])))
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[0] < 50 < 90 < first.get_ylim()[1]
    assert texts_of(figure.legends[0].get_texts()) == ["fixed", "teacher"]


def test_curves_are_those_of_the_records(tmp_path):
    for seed, top1 in ((1, 70.0), (2, 60.0)):
        write_run(tmp_path, selection="adaptive", seed=seed, accuracies=[20, 50, 60, top1], done=4 - (seed == 2))
    groups = grouped(find_runs([tmp_path]))
    lines = next(accuracy_figures(groups)).axes[0].lines
    assert list(lines[0].get_xdata()) == [1, 2, 3, 4]
    assert list(lines[0].get_ydata()) == [20, 50, 60, 70]
    gates = next(share_figures(groups)).axes[1].lines[0].get_ydata()
    np.testing.assert_allclose(gates, groups[0].first.curve("train.gate/f2") * 100)
    training, validation = next(cross_entropy_figures(groups)).axes[0].lines[:2]
    np.testing.assert_allclose(training.get_ydata(), groups[0].first.curve("train.loss/ce"))
    np.testing.assert_allclose(validation.get_ydata(), groups[0].first.curve("val.loss/total"))


def test_the_gain_of_the_policy_is_drawn_with_its_interval(tmp_path):
    for seed, fixed, adaptive in ((1, 70, 71), (2, 71, 73), (3, 72, 72)):
        write_run(tmp_path, selection="fixed", seed=seed, accuracies=[1, 2, 3, fixed])
        write_run(tmp_path, selection="adaptive", seed=seed, accuracies=[1, 2, 3, adaptive])
    (figure,) = difference_figures(grouped(find_runs([tmp_path])))
    points, (_, _), (bars,) = figure.axes[0].containers[0]
    assert points.get_xdata().tolist() == [1.0]
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [1 - 2.484138, 1 + 2.484138], atol=1e-5)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_heatmap_and_confusion_keep_a_readable_size_for_any_number_of_classes(classes, tmp_path):
    run = read_run(write_run(tmp_path, selection="adaptive", num_classes=classes))
    names = [f"class number {k}" for k in range(classes)]
    for figure in (class_heatmap(run.gate_shares(), names, "t"), confusion_figure(np.eye(classes), names, "t")):
        assert figure.get_figheight() < 12
        assert len(figure.axes[0].get_yticklabels()) <= 60


def test_a_class_that_was_not_seen_leaves_its_cells_blank(tmp_path):
    folder = write_run(tmp_path, selection="adaptive", num_classes=2)
    line = {"global_epoch": 4, "gates": ["f1", "logits"], "classes": [[0.5, 1.0], [None, None]]}
    (folder / "gates.jsonl").write_text(json.dumps(line) + "\n")
    assert texts_of(class_heatmap(read_run(folder).gate_shares(), None, "t").axes[0].texts) == ["50", "100"]


def test_class_names_are_never_cut_and_confusions_are_counted(tmp_path):
    names = (LONG_NAME, "b")
    panel = confusion_figure(np.array([[7, 3], [0, 1200]]), names, "t").axes[0]
    assert texts_of(panel.get_yticklabels()) == [f"{LONG_NAME} (10)", "b (1,200)"]
    assert texts_of(panel.get_xticklabels()) == list(names)
    assert texts_of(panel.texts) == ["7", "3", "1200"]
    run = read_run(write_run(tmp_path, selection="adaptive", num_classes=2))
    assert set(texts_of(class_heatmap(run.gate_shares(), names, "t").axes[0].get_yticklabels())) == set(names)


def test_names_are_text_for_matplotlib_and_for_the_page(tmp_path):
    settings = {"dataset": {"name": "digits", "label": "digits"}}
    config = write_run(tmp_path / "run", selection="adaptive", settings=settings) / "config.yml"
    config.write_text(config.read_text().replace("label: digits", "label: '<b>$x^{'"))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-images"]) == 0
    assert "<b>$x^{" not in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 6
    assert png(confusion_figure(np.eye(2), ["$a^{", "$b_"], "$t^"))


def test_the_gallery_picks_the_samples_distilled_most_and_least():
    frequency = np.array([0.5, 0.9, 0.1, 1.0, 0.0, 0.5])
    assert extremes(frequency, 2, most=True).tolist() == [3, 1]
    assert extremes(frequency, 2, most=False).tolist() == [4, 2]


def test_among_equals_the_gallery_spreads_its_choice_over_the_data_set():
    frequency = np.ones(100)
    frequency[50] = 0
    assert extremes(frequency, 4, most=True).tolist() == [0, 24, 49, 75]
    assert extremes(frequency, 4, most=False).tolist() == [50], (
        "an image that was always distilled is none of the least"
    )
    assert extremes(np.ones(100), 4, most=True).size == 0


def test_the_gallery_shows_the_chosen_images(tmp_path):
    grey = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    source = source_of(Arrays(grey, torch.zeros(len(grey), dtype=torch.int64)), LONG_NAME)
    gates = np.zeros((len(grey), 2))
    gates[[3, 7], 0] = 1
    folder = write_run(tmp_path, selection="adaptive")
    write_samples(folder, 1, gates, ["f1", "logits"])
    most, _, logits, _ = gallery_figure(read_run(folder).gate_samples(), source, "a run").axes
    shown = most.images[0].get_array()
    assert [shown[0, 0, 0], shown[0, 70, 0], shown[0, 140, 0]] == [30, 70, 255], "samples 3 and 7, then blank"
    assert "equally often (0 %)" in logits.get_title(loc="left")
    assert LONG_NAME in most.texts[0].get_text().replace("-\n", "-").replace("\n", " ")


def test_an_image_that_has_gone_since_leaves_a_blank_in_the_gallery(tmp_path):
    source = source_of(Files([tmp_path / f"{k}.png" for k in range(3)], [0] * 3), "thing")
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    folder = write_run(tmp_path, selection="adaptive")
    write_samples(folder, 1, np.array([[1, 1], [1, 1], [0, 1]]), ["f1", "logits"])
    most = gallery_figure(read_run(folder).gate_samples(), source, "a run").axes[0]
    shown = most.images[0].get_array()
    assert [shown[0, 0, 0], shown[0, 70, 0]] == [255, 0]
    assert "cannot\nbe read" in texts_of(most.texts)


def test_the_gallery_waits_for_ten_epochs_and_says_why_it_is_not_there(tmp_path):
    (image_folder(tmp_path / "images", train=12, val=1) / "train").rename(tmp_path / "own")
    data = {"name": "imagefolder", "label": "own", "root": str(tmp_path / "own"), "val_split": 0.25}
    keys = {"distiller": "kd", "num_classes": 2, "settings": {"dataset": data}}
    folder = write_run(tmp_path / "run", selection="adaptive", **keys)

    def detail(epochs):
        write_samples(folder, epochs, np.random.default_rng(0).integers(0, 9, (18, 1)), ["logits"])
        build._load_source.cache_clear()
        (section,) = build.detail_sections([read_run(folder)], tmp_path, limit=1, with_images=True)
        return section.texts[-1], any("gallery" in figure.name for figure in section.figures)

    early = "The images distilled most and least often are shown after 10 epochs; so far 9."
    assert detail(9) == (early, False)
    assert detail(10)[1]
    (tmp_path / "own/bee/000.png").unlink()
    text, is_shown = detail(11)
    assert f"{tmp_path / 'own'} does not hold exactly the 18 images" in text
    assert not is_shown


def test_the_page_is_self_contained_and_links_to_every_run(tmp_path, capsys):
    runs, out = tmp_path / "my run", tmp_path / "out"
    folder = write_run(runs, selection="adaptive")
    write_samples(folder, 10, np.random.default_rng(0).integers(0, 5, (776, 4)), SPOTS)
    write_run(runs, selection="fixed", done=1)
    write_run(runs, selection="anti", dataset="cifar-100", teacher="vgg13", student="vgg8", done=0)
    write_run(runs, selection="single", student="resnet8")
    assert main([str(runs), "--out", str(out)]) == 0
    page = (out / "report.html").read_text()
    assert "stopped 1/4" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    folders = {source for source in sources if not source.startswith(("#", "data:"))}
    assert {(out / folder.replace("%20", " ")).resolve() for folder in folders} == {r.path for r in find_runs([runs])}
    assert "url(" not in page
    assert "@import" not in page
    figures = {file.stem for file in (out / "figures").iterdir()}
    for part in ("accuracy-1", "cross-entropy-1", "gate-shares-1", "losses-1", "classes-1", "gallery-1"):
        assert any(name.endswith(part) for name in figures), part
    assert "## Results on digits" in capsys.readouterr().out


def test_runs_of_one_epoch_or_none_make_a_report(tmp_path):
    write_run(tmp_path / "run", selection="single", done=0)
    write_run(tmp_path / "run", selection="adaptive", epochs=1)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "stopped 0/4" in (tmp_path / "out" / "report.html").read_text()
    assert len(list((tmp_path / "out" / "figures").iterdir())) == 6


def test_a_figure_that_cannot_be_drawn_is_named_and_the_others_are_drawn(tmp_path, monkeypatch, caplog):
    run = read_run(write_run(tmp_path, selection="adaptive"))
    monkeypatch.setattr(build, "loss_figure", lambda run: 1 / 0)
    (section,) = build.detail_sections([run], tmp_path, limit=1, with_images=False)
    assert [figure.name.split("-")[-2] for figure in section.figures] == ["classes"]
    assert "losses failed: ZeroDivisionError" in caplog.text


def test_the_mistakes_are_the_wrong_predictions_of_which_the_student_is_most_certain():
    found = Predictions(np.array([0, 1, 2, 2]), np.array([0, 2, 2, 0]), np.array([0.9, 0.6, 0.8, 0.7]))
    assert found.worst(5).tolist() == [3, 1]
    assert found.confusion(3).tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 1]]
    panel = class_figure(found, ("a", "b", "c"), "t").axes[0]
    assert texts_of(panel.get_yticklabels()) == ["c", "a", "b"], "the most frequent class first"
    assert [bar.get_width() for bar in panel.patches] == [2, 1, 1, 2, 2, 0]


def test_the_best_student_is_shown_with_its_confusions_and_mistakes(tmp_path, caplog):
    run = read_run(trained_pair(tmp_path / "run"))
    source = build.load_source(run)
    predictions = predict(run, source)
    assert predictions.labels.tolist() == source.val.labels.tolist()
    hits = 100 * (predictions.labels == predictions.predicted).mean()
    assert hits == pytest.approx(run.best_top1, abs=0.01)
    (section,) = build.student_sections("digits", grouped([run]))
    assert [figure.name for figure in section.figures] == [
        "digits-confusion-1",
        "digits-class-counts-1",
        "digits-mistakes-1",
    ]
    index = predictions.worst(1)[0]
    panel = mistakes_figure(predictions, source.val, source.class_names, "t").axes[0]
    assert panel.get_title(loc="left").startswith(f"{source.class_names[predictions.labels[index]]}\n→ ")
    (run.path / "ckpt" / "best.pth").write_bytes(b"")
    assert build.student_sections("digits", grouped([run])) == []
    assert "its confusions are left out" in caplog.text
