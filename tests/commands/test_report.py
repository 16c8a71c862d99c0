"""The report: which runs it finds, what its tables say, which images it picks, what its page holds."""

import csv
import errno
import fcntl
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from made_up_runs import write_run, write_samples
from PIL import Image

from datasets.source import Arrays, Files, Source
from utils.errors import UserError
from utils.report.__main__ import main
from utils.report.confusion import confusion_figure
from utils.report.gallery import extremes, gallery_figure
from utils.report.gate_plots import class_heatmap
from utils.report.statistics import Difference, Summary, paired_difference, summarise
from utils.report.table import Table
from utils.report.tables import result_records, result_rows, result_table
from utils.run_folder.read import find_runs, read_run


def write_pair_of_seeds(root):
    """Fixed 70, 71, 72 and adaptive 71, 73, 72 after the last epoch, for seeds 1, 2, 3; each once better before."""
    for seed, fixed, adaptive in ((1, 70, 71), (2, 71, 73), (3, 72, 72)):
        write_run(root, selection="fixed", seed=seed, accuracies=[60, 65, 74, fixed])
        write_run(root, selection="adaptive", seed=seed, accuracies=[60, 65, 75, adaptive])


def the_row(root):
    (row,) = result_rows(find_runs([root]))
    return row


def test_mean_and_sample_deviation_are_those_worked_out_by_hand():
    assert summarise([70.0, 71.0, 72.0]) == Summary(71.0, 1.0, 3)
    assert summarise([70.0]) == Summary(70.0, None, 1)
    assert summarise([]) is None


def test_the_paired_interval_is_students():
    # Differences 1, 2, 0: mean 1, deviation 1; t(0.975, 2) = 4.302653; half width 4.302653 / sqrt(3).
    found = paired_difference({1: 71, 2: 73, 3: 72, 9: 50}, {1: 70, 2: 71, 3: 72, 8: 90})
    assert (found.mean, found.n) == (1.0, 3)
    assert found.half_width == pytest.approx(2.484138, abs=1e-5)


def test_one_common_seed_gives_a_difference_without_an_interval_and_none_gives_nothing():
    assert paired_difference({1: 71.0, 2: 75.0}, {1: 70.0}) == Difference(1.0, None, 1)
    assert paired_difference({1: 71.0}, {2: 70.0}) is None


def test_a_row_gathers_seeds_and_compares_adaptive_with_fixed(tmp_path):
    write_pair_of_seeds(tmp_path)
    row = the_row(tmp_path)
    assert str(row.summary("fixed", "last")) == "71.00±1.00 (3)"
    assert str(row.summary("fixed", "best")) == "74.00±0.00 (3)"
    assert str(row.difference("last")) == "+1.00 [-1.48, +3.48] (3)"
    assert str(row.summary("teacher", "last")) == "75.00±0.00 (3)"
    assert row.cells["anti"].text("last") == ""


def test_a_finished_teacher_and_student_alone_fill_their_columns(tmp_path):
    write_run(tmp_path, selection="fixed", done=2)
    write_run(tmp_path, selection="single", student="resnet20", accuracies=[1, 2, 81, 80])
    write_run(tmp_path, selection="single", student="resnet8", accuracies=[1, 2, 66, 65])
    row = the_row(tmp_path)
    assert row.cells["teacher"].text("last") == "81.00 (1)", "the checkpoint that teaches is the best one"
    assert row.cells["single"].text("last") == "65.00 (1)"


def test_a_student_alone_of_another_length_is_no_baseline(tmp_path):
    write_run(tmp_path, selection="fixed")
    write_run(tmp_path, selection="single", student="resnet8", epochs=9)
    assert the_row(tmp_path).cells["single"].text("last") == ""


def test_unfinished_runs_are_shown_as_such_and_never_averaged(tmp_path):
    write_run(tmp_path, selection="fixed", seed=1, accuracies=[1, 2, 3, 70])
    write_run(tmp_path, selection="fixed", seed=2, done=2)
    write_run(tmp_path, selection="adaptive", seed=1, done=3)
    write_run(tmp_path, selection="anti", seed=1, done=0)
    row = the_row(tmp_path)
    assert row.cells["fixed"].text("last") == "70.00 (1) +1 stopped"
    assert row.cells["adaptive"].text("last") == "stopped 3/4"
    assert row.cells["anti"].text("last") == "stopped 0/4"
    assert row.difference("last") is None


def test_a_run_whose_folder_is_held_by_a_process_is_running(tmp_path):
    folder = write_run(tmp_path, selection="fixed", done=2)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert find_runs([tmp_path])[0].status == "running"
    assert find_runs([tmp_path])[0].status == "stopped"


def test_the_result_of_a_run_resumed_with_more_epochs_does_not_make_it_finished(tmp_path):
    folder = write_run(tmp_path, selection="fixed", epochs=4)
    config = folder / "config.yml"
    config.write_text(config.read_text().replace("epochs: 4", "epochs: 8"))
    (run,) = find_runs([tmp_path])
    assert run.progress == "stopped 4/8"


def test_a_line_that_is_still_being_written_is_left_out(tmp_path):
    folder = write_run(tmp_path, selection="fixed", done=2)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"phase": "tra')
    assert find_runs([tmp_path])[0].epochs_done == 2


def test_runs_under_another_teacher_get_a_row_of_their_own_but_not_those_under_one_of_another_seed(tmp_path):
    for root, teacher in {"a": "run/t/{}/last.pth", "b": "run/t/1/last.pth", "c": "run/other/{}/last.pth"}.items():
        for seed in (1, 2):
            kd = {"teacher": {"name": "resnet20", "checkpoint": teacher.format(seed)}}
            write_run(tmp_path / root / str(seed), selection="fixed", seed=seed, settings={"kd": kd})
    rows = result_rows(find_runs([tmp_path / "a", tmp_path / "c"]))
    assert [(row.variant, set(row.cells["fixed"].last)) for row in rows] == [
        ("teacher=run/t/last", {1, 2}),
        ("teacher=run/other/last", {1, 2}),
    ]
    assert len(result_rows(find_runs([tmp_path / "a", tmp_path / "b"]))) == 1


def test_runs_with_other_settings_get_a_row_of_their_own(tmp_path):
    write_run(tmp_path / "a", selection="fixed", seed=1)
    write_run(tmp_path / "b", selection="fixed", seed=1, settings={"training": {"lr": 0.1, "num_workers": 9}})
    assert [row.variant for row in result_rows(find_runs([tmp_path]))] == [
        "training.lr=0.05 training.lr_agent=0.025",
        "training.lr=0.1 training.lr_agent=0.05",
    ]


def test_runs_share_a_row_whatever_keys_differ_that_decide_no_result(tmp_path):
    keys = {"keep_checkpoints": 3, "save_ep_freq": 1, "print_iter_freq": 7, "optimizer": {"lr": 0.5}, "lr": 0.05}
    write_run(tmp_path / "a", selection="fixed", seed=1)
    write_run(tmp_path / "b", selection="fixed", seed=2, settings={"training": keys, "validation": {"batch_size": 9}})
    assert the_row(tmp_path).variant == ""


def test_published_figures_stand_beside_ours_for_their_data_set_alone(tmp_path):
    names = {"teacher": "vgg13", "student": "vgg8", "distiller": "at"}
    write_run(tmp_path / "a", selection="fixed", dataset="cifar-100", **names)
    table = result_table(result_rows(find_runs([tmp_path / "a"])), "last")
    assert dict(zip(table.header, table.rows[0]))["adaptive*"] == "73.64"
    assert dict(zip(table.header, table.rows[0]))["teacher*"] == "74.64"
    write_run(tmp_path / "b", selection="fixed", dataset="digits", **names)
    assert "adaptive*" not in result_table(result_rows(find_runs([tmp_path / "b"])), "last").header


def test_records_leave_out_what_is_not_known(tmp_path):
    write_run(tmp_path, selection="fixed", accuracies=[1, 2, 3, 70])
    last = result_records(result_rows(find_runs([tmp_path])))[0]
    assert (last["measure"], last["fixed_mean"], last["fixed_std"], last["fixed_n"]) == ("last", 70, None, 1)
    assert last["adaptive_mean"] is None
    assert last["adaptive_minus_fixed_mean"] is None


def test_markdown_columns_are_aligned():
    lines = Table(("a", "long"), [("wide cell", "1")]).markdown().splitlines()
    assert lines == ["| a         | long |", "|-----------|------|", "| wide cell | 1    |"]


def test_a_folder_without_runs_is_a_one_line_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path])
    with pytest.raises(UserError, match="no such folder"):
        find_runs([tmp_path / "missing"])


def test_the_gallery_picks_the_samples_distilled_most_and_least():
    frequency = np.array([0.5, 0.9, 0.1, 1.0, 0.0, 0.5])
    assert extremes(frequency, 2, most=True).tolist() == [3, 1]
    assert extremes(frequency, 2, most=False).tolist() == [4, 2]


def test_among_equals_the_gallery_spreads_its_choice_over_the_data_set():
    frequency = np.ones(100)
    frequency[50] = 0
    assert extremes(frequency, 4, most=True).tolist() == [0, 24, 49, 75]
    assert extremes(frequency, 4, most=False).tolist() == [50], (
        "an image that was always distilled is not among the least"
    )
    assert extremes(np.ones(100), 4, most=True).size == 0


def test_the_newest_counts_of_the_samples_become_frequencies(tmp_path):
    folder = write_run(tmp_path, selection="adaptive")
    write_samples(folder, 5, np.array([[5, 5], [0, 0]]), ["f1", "logits"])
    write_samples(folder, 10, np.array([[5, 0], [10, 10]]), ["f1", "logits"])
    samples = read_run(folder).gate_samples()
    assert samples.epochs == 10
    assert samples.frequency.tolist() == [[0.5, 0], [1, 1]]


def test_the_gallery_shows_the_chosen_images(tmp_path):
    grey = torch.arange(0, 250, 10, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    split = Arrays(grey, torch.zeros(len(grey), dtype=torch.int64))
    source = Source(split, split, ("thing",), (0.5,) * 3, (0.5,) * 3, None, (8, 8))
    gates = np.zeros((len(grey), 2))
    gates[[3, 7], 0] = 1
    folder = write_run(tmp_path, selection="adaptive")
    write_samples(folder, 1, gates, ["f1", "logits"])
    figure = gallery_figure(read_run(folder).gate_samples(), source, "a run")
    most, _, logits, _ = figure.axes
    shown = most.images[0].get_array()
    assert [shown[0, 0, 0], shown[0, 70, 0], shown[0, 140, 0]] == [30, 70, 255], "samples 3 and 7, then blank"
    assert "equally often (0 %)" in logits.get_title(loc="left")


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_heatmap_and_confusion_keep_a_readable_size_for_any_number_of_classes(classes, tmp_path):
    folder = write_run(tmp_path, selection="adaptive", num_classes=classes)
    (run,) = find_runs([folder])
    names = [f"class number {k}" for k in range(classes)]
    for figure in (class_heatmap(run.gate_shares(), names, "t"), confusion_figure(np.eye(classes), names, "t")):
        assert figure.get_figheight() < 12
        assert len(figure.axes[0].get_yticklabels()) <= 60


def test_a_class_that_was_not_seen_leaves_its_cells_blank(tmp_path):
    folder = write_run(tmp_path, selection="adaptive", num_classes=2)
    line = {"global_epoch": 4, "gates": ["f1", "logits"], "classes": [[0.5, 1.0], [None, None]]}
    (folder / "gates.jsonl").write_text(json.dumps(line) + "\n")
    (run,) = find_runs([folder])
    written = [text.get_text() for text in class_heatmap(run.gate_shares(), None, "t").axes[0].texts]
    assert written == ["50", "100"]


def test_the_page_is_self_contained_and_mentions_every_run(tmp_path, capsys):
    runs = tmp_path / "run"
    folder = write_run(runs, selection="adaptive")
    write_samples(folder, 10, np.random.default_rng(0).integers(0, 5, (776, 4)), ["f1", "f2", "f3", "logits"])
    write_run(runs, selection="fixed", done=1)
    write_run(runs, selection="anti", dataset="cifar-100", teacher="vgg13", student="vgg8", done=0)
    write_run(runs, selection="single", student="resnet8")
    assert main([str(runs), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    for run in find_runs([runs]):
        assert str(run.path) in page
    assert "stopped 1/4" in page
    sources = re.findall(r"""(?:src|href)=["']([^"']*)""", page)
    folders = {source for source in sources if not source.startswith(("#", "data:"))}
    assert {(tmp_path / "out" / folder).resolve() for folder in folders} == {run.path for run in find_runs([runs])}
    assert "url(" not in page
    assert "@import" not in page
    figures = {file.stem for file in (tmp_path / "out" / "figures").iterdir()}
    for part in ("accuracy-1", "cross-entropy-1", "gate-shares-1", "losses", "classes", "gallery"):
        assert any(name.endswith(part) for name in figures), part
    assert "## digits, last epoch" in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "out" / "runs.csv").open()))
    assert sorted(row["status"] for row in rows) == ["finished", "finished", "stopped", "stopped"]


def test_pictures_and_tables_of_somebody_elses_are_left_alone(tmp_path):
    write_run(tmp_path / "run", selection="single", done=0)
    for name in ("figures/holiday.png", "runs.csv"):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("mine")
        with pytest.raises(UserError, match=r"exists already, and no report\.md beside it; --out names another place"):
            main([str(tmp_path / "run"), "--out", str(tmp_path)])
        assert file.read_text() == "mine"
        file.unlink()


def test_an_image_that_has_gone_since_leaves_a_blank_in_the_gallery(tmp_path):
    split = Files([tmp_path / f"{k}.png" for k in range(3)], [0] * 3)
    source = Source(split, split, ("thing",), (0.5,) * 3, (0.5,) * 3, None, (8, 8))
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    folder = write_run(tmp_path, selection="adaptive")
    write_samples(folder, 1, np.array([[1, 1], [1, 1], [0, 1]]), ["f1", "logits"])
    most = gallery_figure(read_run(folder).gate_samples(), source, "a run").axes[0]
    shown = most.images[0].get_array()
    assert [shown[0, 0, 0], shown[0, 70, 0]] == [255, 0]
    assert "cannot\nbe read" in [text.get_text() for text in most.texts]


def test_linked_folders_are_searched_once(tmp_path):
    write_run(tmp_path / "disk" / "run", selection="single")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path)
    assert len(find_runs([tmp_path / "run"])) == 1


def test_a_copy_of_a_run_is_counted_once_and_named(tmp_path, capsys):
    folder = write_run(tmp_path / "run", selection="fixed", seed=1)
    shutil.copytree(folder, tmp_path / "run" / "backup")
    write_run(tmp_path / "run", selection="fixed", seed=2)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-images"]) == 0
    sentence = f"Left out, since another run has their seed and their settings: {tmp_path}/run/"
    assert sentence in capsys.readouterr().out
    assert sentence in (tmp_path / "out" / "report.html").read_text()


def test_a_disk_that_is_full_leaves_the_report_that_was_there(tmp_path, monkeypatch):
    write_run(tmp_path / "run", selection="single")
    words = [str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-plots"]
    assert main(words) == 0
    before = (tmp_path / "out" / "runs.csv").read_bytes()
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match=r"cannot write there \(No space left on device\)"):
        main(words)
    assert (tmp_path / "out" / "runs.csv").read_bytes() == before
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["report.md", "results.csv", "runs.csv"]


def full_disk(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_one_run_without_an_epoch_makes_a_report(tmp_path):
    write_run(tmp_path / "run", selection="single", done=0)
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out")]) == 0
    assert "stopped 0/4" in (tmp_path / "out" / "report.html").read_text()


def test_names_in_the_page_are_escaped(tmp_path):
    settings = {"dataset": {"name": "digits", "label": "digits"}}
    folder = write_run(tmp_path / "run", selection="fixed", settings=settings)
    config = folder / "config.yml"
    config.write_text(config.read_text().replace("label: digits", "label: <b>digits"))
    assert main([str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--no-images"]) == 0
    assert "<b>digits" not in (tmp_path / "out" / "report.html").read_text()
