"""What the report makes visible: weights of losses, seeds, settings, whole names, costs, and the gap to the teacher."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from made_up_runs import BETA, write_run, write_samples
from pictures import image_folder

from datasets.source import Arrays, Source
from utils.report.build import _load_source, setting, without_choice
from utils.report.confusion import confusion_figure
from utils.report.curves import accuracy_figures, by_panel, cross_entropy_figures
from utils.report.gallery import gallery_figure
from utils.report.gate_plots import class_heatmap, share_figures
from utils.report.losses import contributions, loss_figure
from utils.report.run_table import run_records, run_table
from utils.report.settings import common_settings
from utils.report.table import Table
from utils.report.tables import gap_closed, result_rows, result_table, result_tables
from utils.report.write import write_report
from utils.run_folder.read import find_runs, read_run

LONG_NAME = "a class whose name is longer than twenty-two letters"


def one(folder):
    return read_run(folder)


@pytest.mark.parametrize("facts", [True, False], ids=["written down", "older run"])
def test_terms_of_the_loss_with_their_weights_add_up_to_the_total(tmp_path, facts):
    terms = contributions(one(write_run(tmp_path, selection="adaptive", facts=facts)))
    total = terms.pop("loss/total")
    assert sorted(terms) == ["loss/ce", "loss/f1", "loss/f2", "loss/f3", "loss/kl"]
    np.testing.assert_allclose(np.sum(list(terms.values()), axis=0), total)


def test_a_weight_that_grows_over_the_first_epochs_is_shown_growing(tmp_path):
    folder = write_run(tmp_path, selection="adaptive")
    facts = json.loads((folder / "facts.json").read_text())
    facts["weights"]["loss/f1"] = [BETA, 2]
    (folder / "facts.json").write_text(json.dumps(facts))
    run = one(folder)
    plain = [BETA * record["train"]["loss/f1"] for record in run.records]
    np.testing.assert_allclose(contributions(run)["loss/f1"], np.multiply(plain, [0.5, 1, 1, 1]))


def test_terms_of_a_single_epoch_are_bars_with_their_numbers(tmp_path):
    panel = loss_figure(one(write_run(tmp_path, selection="adaptive", epochs=1))).axes[0]
    assert len(panel.patches) == 7
    assert {"total", "cross-entropy", "beta * distiller at f1"} <= {t.get_text() for t in panel.get_yticklabels()}


def test_all_panels_of_accuracy_have_one_scale_and_seeds_have_dashes_of_their_own(tmp_path):
    for seed in (1, 2):
        write_run(tmp_path, selection="fixed", seed=seed, accuracies=[20, 50, 60, 70])
        write_run(tmp_path, selection="fixed", seed=seed, distiller="sp", accuracies=[20, 80, 85, 90])
    (figure,) = accuracy_figures(find_runs([tmp_path]))
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert first.get_ylim()[0] < 20 < 90 < first.get_ylim()[1]
    dashes = {str(line._unscaled_dash_pattern) for line in first.lines[:2]}
    assert len(dashes) == 2
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["fixed", "teacher", "seed 1", "seed 2"]


def test_runs_of_one_epoch_stand_side_by_side_by_selection(tmp_path):
    for selection in ("fixed", "adaptive", "anti"):
        write_run(tmp_path, selection=selection, epochs=1, accuracies=[61.5])
    runs = find_runs([tmp_path])
    for figures in (accuracy_figures, cross_entropy_figures, share_figures):
        (figure,) = figures(runs)
        panel = figure.axes[0]
        names = [text.get_text() for text in panel.get_xticklabels()]
        assert names == [
            name for name in ("fixed", "anti", "adaptive") if figures is not share_figures or name != "fixed"
        ]
        assert panel.get_xlabel() == ""
    (figure,) = accuracy_figures(runs)
    assert [text.get_text() for text in figure.axes[0].texts] == ["61.5"] * 3


def test_columns_without_an_entry_and_a_second_table_of_the_same_are_left_out(tmp_path):
    write_run(tmp_path, selection="fixed", epochs=1)
    rows = result_rows(find_runs([tmp_path]))
    assert list(result_tables(rows)) == ["last epoch, which is the best"]
    assert list(result_table(rows, "last").header) == ["pair", "distiller", "teacher", "fixed"]
    write_run(tmp_path, selection="adaptive", epochs=1)
    write_run(tmp_path / "b", selection="fixed", epochs=4, accuracies=[1, 9, 3, 4])
    assert list(result_tables(result_rows(find_runs([tmp_path])))) == ["last epoch", "best epoch"]


def test_settings_that_differ_stand_in_every_row_and_those_that_do_not_are_said_once(tmp_path):
    write_run(tmp_path, selection="fixed", epochs=1)
    write_run(tmp_path, selection="fixed", distiller="sp", epochs=1)
    assert [row.variant for row in result_rows(find_runs([tmp_path]))] == ["", ""]
    assert common_settings(find_runs([tmp_path])) == "All runs: 1 epoch, batches of 64, learning rate 0.05."
    write_run(tmp_path / "b", selection="fixed", distiller="kd", epochs=4)
    runs = find_runs([tmp_path])
    variants = {row.distiller: row.variant for row in result_rows(runs)}
    assert variants == {k: f"training.epochs={n}" for k, n in (("at", 1), ("sp", 1), ("kd", 4))}
    assert common_settings(runs) == "All runs: batches of 64, learning rate 0.05."
    assert len(by_panel(runs)) == 3


def test_other_options_or_other_images_are_other_settings(tmp_path):
    for k, options in enumerate(({}, {"power": 2})):
        write_run(tmp_path / str(k), selection="fixed", settings={"kd_loss": {"options": options}})
    assert [row.variant for row in result_rows(find_runs([tmp_path]))] == [
        "kd_loss.options={}",
        "kd_loss.options={'power': 2}",
    ]


def test_runs_on_other_images_share_neither_a_row_nor_a_teacher(tmp_path):
    for root in ("cats", "dogs"):
        place = {"dataset": {"root": root}}
        write_run(tmp_path / root, selection="fixed", dataset="imagefolder", teacher_top1=None, settings=place)
    place = {"dataset": {"root": "./dogs/"}}
    for student in ("resnet20", "resnet8"):
        write_run(tmp_path / "x", selection="single", student=student, dataset="imagefolder", settings=place)
    rows = {row.variant: row for row in result_rows(find_runs([tmp_path]))}
    assert list(rows) == ["dataset.root=cats", "dataset.root=dogs"]
    for column in ("teacher", "single"):
        assert rows["dataset.root=cats"].cells[column].text("last") == ""
        assert rows["dataset.root=dogs"].cells[column].text("last") != ""


def test_the_share_of_the_gap_to_the_teacher_is_that_worked_out_by_hand(tmp_path):
    assert gap_closed(72, 70, 75) == pytest.approx(40)
    assert gap_closed(72, 75, 75) is gap_closed(None, 70, 75) is None
    for seed, alone, fixed in ((1, 70, 72), (2, 71, 73)):
        write_run(tmp_path, selection="single", student="resnet8", seed=seed, accuracies=[1, 2, 3, alone])
        write_run(tmp_path, selection="fixed", seed=seed, accuracies=[1, 2, 3, fixed])
    runs = find_runs([tmp_path])
    table = result_table(result_rows(runs), "last")
    assert dict(zip(table.header, table.rows[0]))["gap closed: fixed"] == "44 %"  # 2 of 4.5
    assert [record["gap_closed"] for record in run_records(runs)][:2] == pytest.approx([40, 50])


def test_a_run_without_a_choice_is_told_in_the_table_and_in_a_sentence(tmp_path):
    for selection in ("adaptive", "anti"):
        write_run(tmp_path, selection=selection, distiller="kd")  # its only gate is always open
    runs = find_runs([tmp_path])
    sentences = without_choice(runs)
    assert "the policy distilled everywhere (>= 99.5 % at every spot) since epoch 1, as fixed does" in sentences[0]
    assert "distilled nowhere (<= 0.5 % at every spot) since epoch 1, as if there were no teacher" in sentences[1]
    table = result_table(result_rows(runs), "last")
    assert dict(zip(table.header, table.rows[0]))["no choice"] == "anti: 1 nowhere; adaptive: 1 everywhere"
    table, _ = run_table(runs, run_records(runs))
    assert [dict(zip(table.header, row))["no choice"] for row in table.rows] == [
        "everywhere since 1",
        "nowhere since 1",
    ]


def test_every_run_has_its_costs_its_command_and_a_link_to_its_folder(tmp_path):
    folder = write_run(tmp_path / "my runs", selection="fixed")
    write_run(tmp_path / "my runs", selection="anti")
    runs = find_runs([tmp_path])
    write_report(runs, tmp_path / "out", with_images=False, details=0)
    anti, fixed = csv.DictReader((tmp_path / "out" / "runs.csv").open())
    assert (fixed["parameters"], fixed["flops"], fixed["teacher_flops"]) == ("78042", "25003264", "81625600")
    assert (fixed["lr"], fixed["batch_size"], fixed["seconds"], fixed["data"]) == ("0.05", "64", "8.0", "data")
    assert "net1=resnet20 net2=resnet8 distiller=at sh train.sh kd.selection=fixed" in fixed["command"]
    assert "training.epochs=4" in fixed["command"]
    assert " sh train_anti.sh " in anti["command"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f'href="../{os.path.relpath(folder, tmp_path)}/"'.replace(" ", "%20") in page
    assert "776 images to train on, 1,021 to validate, 10 classes, 32x32 pixels; dataset.root: data" in setting(runs)
    for text in ("776 images to train on", "0.08", "25.00", "0.27 / 81.63", "00:08", "learning rate 0.05"):
        assert text in page


def test_a_command_for_a_config_that_no_launcher_finds_names_its_file(tmp_path, monkeypatch):
    folder = write_run(tmp_path, selection="single", student="resnet8")
    monkeypatch.chdir(tmp_path)
    (record,) = run_records([one(folder)])
    assert record["command"] == f"python train_single.py --config {folder}/config.yml"


def test_what_is_the_same_for_all_runs_stands_above_their_table(tmp_path):
    for selection in ("fixed", "adaptive"):
        write_run(tmp_path, selection=selection, facts=False)
    runs = find_runs([tmp_path])
    table, same = run_table(runs, run_records(runs))
    assert same == "The same for all: dataset digits, data data, status finished, epochs 4/4, lr 0.05, batch 64."
    assert not {"dataset", "lr", "batch", "parameters (M)", "MFLOPs"} & set(table.header)


def test_class_names_are_never_cut_and_confusions_are_counted(tmp_path):
    names = (LONG_NAME, "b")
    counts = np.array([[7, 3], [0, 1200]])
    figure = confusion_figure(counts, names, "t")
    panel = figure.axes[0]
    assert [t.get_text() for t in panel.get_yticklabels()] == [f"{LONG_NAME} (10)", "b (1,200)"]
    assert [t.get_text() for t in panel.get_xticklabels()] == list(names)
    assert [t.get_text() for t in panel.texts] == ["7", "3", "1200"]
    run = one(write_run(tmp_path, selection="adaptive", num_classes=2))
    labels = {text.get_text() for text in class_heatmap(run.gate_shares(), names, "t").axes[0].get_yticklabels()}
    assert labels == set(names)


def test_the_gallery_waits_for_ten_epochs_and_then_has_whole_class_names(tmp_path):
    images = torch.zeros(776, 3, 8, 8, dtype=torch.uint8)
    split = Arrays(images, torch.zeros(776, dtype=torch.int64))
    source = Source(split, split, (LONG_NAME,), (0.5,) * 3, (0.5,) * 3, None, (8, 8))
    gates = np.random.default_rng(0).integers(0, 10, (776, 1))
    folder = write_run(tmp_path / "run", selection="adaptive", distiller="kd")
    write_samples(folder, 9, gates, ["logits"])
    write_report(find_runs([tmp_path / "run"]), tmp_path / "out")
    assert "are shown after 10 epochs; so far 9." in (tmp_path / "out" / "report.html").read_text()
    assert not list((tmp_path / "out" / "figures").glob("*gallery*"))
    write_samples(folder, 10, gates, ["logits"])
    figure = gallery_figure(one(folder).gate_samples(), source, "t")
    assert LONG_NAME in figure.axes[0].texts[0].get_text().replace("-\n", "-").replace("\n", " ")


def test_the_gallery_finds_images_that_the_run_has_divided_or_says_why_it_shows_none(tmp_path):
    (image_folder(tmp_path / "images", train=12, val=1) / "train").rename(tmp_path / "own")
    data = {"name": "imagefolder", "label": "own", "root": str(tmp_path / "own"), "val_split": 0.25}
    folder = write_run(
        tmp_path / "run", selection="adaptive", distiller="kd", num_classes=2, settings={"dataset": data}
    )
    write_samples(folder, 10, np.random.default_rng(0).integers(0, 10, (18, 1)), ["logits"])
    write_report(find_runs([tmp_path / "run"]), tmp_path / "out")
    assert list((tmp_path / "out" / "figures").glob("*gallery*"))
    _load_source.cache_clear()
    (tmp_path / "own/bee/000.png").unlink()
    write_report(find_runs([tmp_path / "run"]), tmp_path / "later")
    assert f"{tmp_path / 'own'} does not hold exactly the 18 images" in (tmp_path / "later" / "report.html").read_text()


def test_a_table_of_lines_keeps_their_order():
    assert Table.of([{"a": "1", "b": "", "c": "2"}, {"a": "", "b": "", "c": ""}]) == Table(
        ["a", "c"], [["1", "2"], ["", ""]]
    )
