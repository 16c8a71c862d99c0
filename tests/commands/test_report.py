"""The report: which runs it finds, which of them it compares, and what its tables say."""

import errno
import fcntl
import json
import os
import shutil

import numpy as np
import pandas as pd
import pytest
from made_up_runs import write_run

from utils.config import Config
from utils.config.errors import all_fields
from utils.errors import UserError
from utils.report.__main__ import main
from utils.report.build import other_recipes
from utils.report.gain import answer, tradeoff_figure
from utils.report.groups import OF_A_POLICY, grouped, replaced
from utils.report.statistics import Difference, mean_text, paired_difference
from utils.report.table import markdown
from utils.report.tables import result_records, result_table, result_tables, run_records, run_table
from utils.report.write import publish, write_report
from utils.run_folder.read import find_runs


def groups_of(*roots):
    return [group for group in grouped(find_runs(roots)) if not group.first.is_single]


def cells(root, measure="last"):
    """The only row of the table of results, by heading."""
    (row,) = result_table(groups_of(root), measure).to_dict("records")
    return row


def series(values):
    return pd.Series(values, dtype=float)


def test_means_and_paired_intervals_are_those_worked_out_by_hand():
    assert mean_text(series([70.0, 71.0, 72.0])) == "71.00±1.00 (3)"
    assert (mean_text(series([70.0])), mean_text(series([]))) == ("70.00 (1)", "")
    assert mean_text(series([70.0, np.nan])).startswith("nan"), "a seed that failed is not left out of the mean"
    # Differences 1, 2, 0: mean 1, deviation 1; t(0.975, 2) = 4.302653; half width 4.302653 / sqrt(3).
    found = paired_difference(series({1: 71, 2: 73, 3: 72, 9: 50}), series({1: 70, 2: 71, 3: 72, 8: 90}))
    assert (found.mean, found.n, found.is_significant) == (1.0, 3, False)
    assert found.half_width == pytest.approx(2.484138, abs=1e-5)
    assert Difference(-2.5, 2.484, 3).is_significant
    assert paired_difference(series({1: 71.0, 2: 75.0}), series({1: 70.0})) == Difference(1.0, None, 1)
    assert paired_difference(series({1: 71.0}), series({2: 70.0})) is None


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A student alone, distilled everywhere and under the policy, each better before its last epoch."""
    root = tmp_path_factory.mktemp("compared")
    names = {"dataset": "cifar-100", "teacher": "vgg13", "student": "vgg8"}
    for seed, alone, fixed, adaptive in ((1, 70, 70, 71), (2, 71, 71, 73), (3, 66, 72, 72)):
        write_run(root, selection="single", seed=seed, accuracies=[60, 65, 73, alone], **names)
        write_run(root, selection="fixed", seed=seed, accuracies=[60, 65, 74, fixed], test_top1=60.0 + seed, **names)
        write_run(root, selection="adaptive", seed=seed, accuracies=[60, 65, 75, adaptive], **names)
    return root


def test_a_row_gathers_seeds_and_compares_selections(compared):
    row = cells(compared)
    assert (
        row
        | {
            "fixed": "71.00±1.00 (3)",
            "adaptive": "72.00±1.00 (3)",
            "adaptive - fixed": "+1.00 [-1.48, +3.48] (3)",
            "single": "69.00±2.65 (3)",
            "fixed - single": "+2.00 [-6.61, +10.61] (3)",
            "teacher": "75.00±0.00 (3)",
            "gap closed: fixed": "33 %",
            "teacher*": "74.64",
            "adaptive*": "73.64",
        }
        == row
    )
    assert not {"anti", "settings", "no choice"} & row.keys(), "empty columns are left out"
    assert cells(compared, "best")["fixed"] == "74.00±0.00 (3)"
    assert list(result_tables(groups_of(compared))) == ["last epoch", "best epoch", "test split, best epoch"]
    test = cells(compared, "test")
    assert (test["fixed"], "teacher" in test) == ("62.00±1.00 (3)", False)


def test_the_csv_has_the_same_as_numbers(compared):
    last, best, test = result_records(groups_of(compared)).to_dict("records")
    assert (last["measure"], last["fixed_mean"], last["fixed_std"], last["fixed_n"]) == ("last", 71, 1, 3)
    assert last["adaptive_minus_fixed_half_width"] == pytest.approx(2.484138, abs=1e-5)
    assert np.isnan(last["anti_mean"])
    assert (best["adaptive_mean"], test["fixed_mean"]) == (75, 62)
    assert set(run_table(run_records(groups_of(compared)))["test % (best epoch)"]) == {"", "61.00", "62.00", "63.00"}


def test_the_first_sentence_names_the_best_student_and_its_gain(compared):
    (sentence,) = answer(groups_of(compared))
    assert sentence == (
        "Best student: vgg13 → vgg8, at, adaptive, 72.00±1.00 (3), over the student alone +3.00 [-3.57, +9.57] (3), "
        "not significant; adaptive instead of fixed adds +1.00 [-1.48, +3.48] (3), not significant. "
        "Its teacher has 75.00."
    )


def test_cost_is_in_flops_until_latencies_are_measured(compared, tmp_path):
    (panel,) = tradeoff_figure(groups_of(compared)).axes
    assert {text.get_text() for text in panel.texts} == {"vgg13", "vgg8", "at, adaptive"}
    assert panel.get_xlabel() == "forward pass of one image (MFLOPs)"
    for selection in ("single", "fixed"):
        folder = write_run(tmp_path, selection=selection) / "evaluation"
        folder.mkdir()
        networks = {"resnet8": 1.5, "resnet20 (teacher)": 4}
        content = {name: {"milliseconds": {"1": value, "64": 9}} for name, value in networks.items()}
        (folder / "evaluation.json").write_text(json.dumps(content))
    (panel,) = tradeoff_figure(groups_of(tmp_path)).axes
    assert sorted({line.get_xdata()[0] for line in panel.lines}) == [1.5, 4]


def test_a_baseline_is_of_the_same_length_and_a_teacher_the_one_that_its_runs_measured(tmp_path):
    write_run(tmp_path, selection="fixed", teacher_top1=None)
    write_run(tmp_path, selection="single", student="resnet20", accuracies=[1, 2, 81, 80])
    write_run(tmp_path / "longer", selection="single", student="resnet8", epochs=9)
    assert not {"teacher", "single"} & cells(tmp_path).keys()
    write_run(tmp_path, selection="single", student="resnet8", accuracies=[1, 2, 66, 65])
    assert cells(tmp_path)["single"] == "65.00 (1)"


def test_unfinished_runs_are_shown_as_such_and_never_averaged(tmp_path):
    write_run(tmp_path, selection="fixed", seed=1, accuracies=[1, 2, 3, 70])
    write_run(tmp_path, selection="fixed", seed=2, done=2)
    folder = write_run(tmp_path, selection="adaptive", seed=1, done=3)
    write_run(tmp_path, selection="shuffled", seed=1, done=0)
    longer = write_run(tmp_path, selection="random", seed=1) / "config.yml"
    longer.write_text(longer.read_text().replace("epochs: 4", "epochs: 8"))  # resumed; its result is that of before
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        rows = result_table(groups_of(tmp_path), "last")
    assert rows["random"].tolist() == ["", "stopped 4/8"]
    row = rows.iloc[0]
    assert (row["fixed"], row["adaptive"], row["shuffled"]) == ("70.00 (1) +1 stopped", "running 3/4", "stopped 0/4")
    assert "adaptive - fixed" not in row


def under(checkpoint, seed=1):
    """Keys of a run whose teacher is a file."""
    kd = {"teacher": {"name": "resnet20", "checkpoint": checkpoint}}
    return {"seed": seed, "settings": {"kd": kd}}


def own_policy(name, options=None):
    return {"selection": "adaptive", "settings": {"kd": {"policy": name, "policy_options": options or {}}}}


def images_of(root):
    return {"dataset": "imagefolder", "settings": {"dataset": {"root": root}}}


@pytest.mark.parametrize(
    ("runs", "settings"),
    [
        ([{}, {"settings": {"training": {"lr": 0.1, "num_workers": 9}}}], "training.lr=0.1"),
        ([{}, {"settings": {"kd_loss": {"options": {"power": 2}}}}], "kd_loss.options={'power': 2}"),
        ([{}, {"seed": 2, "settings": {"training": {"save_ep_freq": 1}, "validation": {"batch_size": 9}}}], None),
        ([under("run/t/1/last.pth"), under("run/other/1/last.pth")], "teacher=run/other/last"),
        ([under("run/t/1/last.pth"), under("run/t/2/last.pth", 2)], None),  # a teacher for each seed
        ([images_of("cats"), images_of("dogs")], "dataset.root=dogs"),
        ([{"distiller": "sp"}, own_policy("unsure")], "kd.policy=unsure"),
        (
            [own_policy("unsure"), own_policy("unsure", {"below": 0.8})],
            "kd.policy=unsure kd.policy_options={'below': 0.8}",
        ),
    ],
)
def test_settings_that_decide_a_result_make_a_row_that_names_them(runs, settings, tmp_path):
    for number, keys in enumerate(runs):
        write_run(tmp_path / str(number), **{"selection": "fixed"} | keys)
    _, *others = sorted(groups_of(tmp_path), key=lambda group: group.first.path)
    assert [group.settings for group in others] == [settings] * (settings is not None)


def test_a_teacher_that_one_run_finds_and_another_names_is_one(tmp_path):
    write_run(tmp_path / "a", selection="fixed", seed=1)
    policy = {"teacher": {"name": "resnet20", "checkpoint": f"{tmp_path}/a/digits/1/resnet20/ckpt/best.pth"}}
    write_run(tmp_path / "b", selection="adaptive", seed=1, settings={"kd": policy | {"policy": "unsure"}})
    _, own = groups_of(tmp_path)
    assert (own.settings, own.first.title) == ("kd.policy=unsure", "resnet20 → resnet8, at, adaptive by unsure, seed 1")
    assert own.difference("adaptive", "fixed") is not None


def test_a_recipe_that_differs_stands_in_every_row(tmp_path):
    for distiller in ("at", "sp"):
        write_run(tmp_path, selection="fixed", distiller=distiller, epochs=1)
    assert [group.settings for group in groups_of(tmp_path)] == ["", ""]
    (recipe,) = run_table(run_records(groups_of(tmp_path)))[["epochs", "lr", "batch"]].drop_duplicates().to_numpy()
    assert recipe.tolist() == ["1/1", "0.05", "64"]
    write_run(tmp_path / "b", selection="fixed", distiller="kd", epochs=4)
    settings = {group.first.distiller: group.settings for group in groups_of(tmp_path)}
    assert settings == {k: f"training.epochs={n}" for k, n in (("at", 1), ("sp", 1), ("kd", 4))}


def test_a_student_alone_is_of_the_same_images(tmp_path):
    for root in ("cats", "dogs"):
        write_run(tmp_path / root, selection="fixed", **images_of(root))
    write_run(tmp_path / "x", selection="single", **images_of("./dogs/"))
    assert [len(row.others) for row in groups_of(tmp_path)] == [0, 1]


def test_a_row_is_compared_with_the_student_alone_of_its_own_recipe(tmp_path):
    for lr, alone in ((0.05, 60.0), (0.01, 40.0)):
        for seed in (1, 2):
            how = {"seed": seed, "settings": {"training": {"lr": lr}}}
            write_run(tmp_path / str(lr), selection="single", accuracies=4 * [alone], **how)
            write_run(tmp_path / str(lr), selection="fixed", accuracies=4 * [alone + 1], **how)
    write_run(tmp_path / "other", selection="fixed", distiller="sp", settings={"training": {"lr": 0.02}})
    rows = groups_of(tmp_path)
    assert [row.difference("fixed", "single").mean for row in rows if row.first.distiller == "at"] == [1.0, 1.0]
    assert [row.others for row in rows if row.first.distiller == "sp"] == [[]], "two recipes are equally close"


def test_a_name_of_several_lines_breaks_no_table():
    table = pd.DataFrame({"class": ["weird\nname", "a|b"]})
    assert markdown(table).splitlines()[2:] == ["| weird\\nname |", "| a\\|b        |"]


def test_that_the_student_alone_is_of_another_recipe_is_said(tmp_path):
    write_run(tmp_path, selection="single")
    assert other_recipes(groups_of(tmp_path)) == []
    write_run(tmp_path, selection="fixed")
    assert other_recipes(groups_of(tmp_path)) == []
    write_run(tmp_path / "b", selection="fixed", distiller="sp", settings={"training": {"lr": 0.02}})
    (line,) = other_recipes(groups_of(tmp_path))
    assert line.startswith("The student alone beside resnet20 → resnet8, sp, training.lr=0.02")
    assert line.endswith("was trained with another training.lr.")


def test_settings_of_a_policy_have_rows_of_their_own_each_beside_the_plain_distiller(tmp_path):
    write_run(tmp_path, selection="fixed", accuracies=4 * [60.0])
    for share in (0.25, 0.5):
        settings = {"kd": {"routing_share": share}, "kd_loss": {"homo": True}}
        write_run(tmp_path / str(share), selection="adaptive", accuracies=4 * [60 + share], settings=settings)
    plain, *rows = groups_of(tmp_path)
    assert (plain.settings, len(plain.runs), plain.others) == ("", 1, [])
    found = {row.settings: row.difference("adaptive", "fixed").mean for row in rows}
    assert found == {f"kd.routing_share={share} kd_loss.homo=True": share for share in (0.25, 0.5)}


def test_the_settings_of_a_policy_are_keys():
    assert {tuple(key.split(".")) for key in OF_A_POLICY} <= {key for key, _ in all_fields(Config)}


def test_students_that_lose_are_called_so(tmp_path):
    write_run(tmp_path, selection="single", accuracies=4 * [60.0])
    write_run(tmp_path, selection="fixed", accuracies=4 * [59.0])
    (sentence,) = answer(groups_of(tmp_path))
    assert sentence.startswith("No distilled student is better than the student alone.")
    for selection, top1 in (("single", 30.0), ("fixed", 40.0)):
        write_run(tmp_path, selection=selection, student="resnet14", accuracies=4 * [top1])
    assert answer(groups_of(tmp_path)) == [sentence.partition("alone. ")[2]]


def test_a_run_without_a_choice_is_named_in_the_tables(tmp_path):
    for selection in ("adaptive", "anti"):
        write_run(tmp_path, selection=selection, distiller="kd")  # its only gate is always open
    assert cells(tmp_path)["no choice"] == "adaptive: 1 everywhere; anti: 1 nowhere"
    assert run_table(run_records(groups_of(tmp_path)))["no choice"].tolist() == [
        "everywhere since 1",
        "nowhere since 1",
    ]


def test_every_run_has_its_costs_and_its_command_and_tables_are_also_latex(tmp_path):
    folder = write_run(tmp_path / "my runs", selection="fixed", teacher="wrn_16_2", accuracies=[1, 2, 3, 70])
    facts = json.loads((folder / "facts.json").read_text()) | {"command": "net1=resnet20 sh train.sh"}
    (folder / "facts.json").write_text(json.dumps(facts))
    without = write_run(
        tmp_path / "my runs", selection="anti", teacher="wrn_16_2", accuracies=[1, 2, 3, 60]
    )  # as runs were before commands were remembered
    write_report(find_runs([tmp_path]), tmp_path / "out", with_plots=False, latex=True)
    anti, fixed = pd.read_csv(tmp_path / "out" / "runs.csv").to_dict("records")
    assert (fixed["parameters"], fixed["flops"], fixed["teacher_flops"]) == (78_042, 25_003_264, 81_625_600)
    assert (fixed["lr"], fixed["batch_size"], fixed["seconds"], fixed["data"]) == (0.05, 64, 8.0, "data")
    assert fixed["command"] == "net1=resnet20 sh train.sh"
    assert anti["command"] == f"python train.py --config '{without}/config.yml'"
    text = (tmp_path / "out" / "report.md").read_text()
    latex = (tmp_path / "out" / "results.tex").read_text()
    assert r"wrn\_16\_2 to resnet8 & at & 70.00 (1)" in latex
    assert latex.count(r"\begin{tabular}") == 1, "last and best epoch are the same one"
    assert all(cell in text for cell in ("0.08", "25.00", "0.27", "81.63", "00:08", "776 images", "32x32 pixels"))


def test_folders_are_searched_once_and_must_hold_a_run(tmp_path):
    write_run(tmp_path / "disk" / "run", selection="single")
    (tmp_path / "run").mkdir()
    with pytest.raises(UserError, match="holds no run"):
        find_runs([tmp_path / "run"])
    with pytest.raises(UserError, match="missing: no such folder"):
        find_runs([tmp_path / "disk", tmp_path / "missing"])
    (tmp_path / "run" / "data").symlink_to(tmp_path / "disk")
    (tmp_path / "disk" / "back").symlink_to(tmp_path)
    assert len(find_runs([tmp_path / "run"])) == 1


def test_a_copy_of_a_run_is_counted_once_and_named(tmp_path):
    folder = write_run(tmp_path, selection="fixed", seed=1)
    shutil.copytree(folder, tmp_path / "backup")
    write_run(tmp_path, selection="fixed", seed=2)
    groups = groups_of(tmp_path)
    assert (len(groups[0].top1("fixed")), len(replaced(groups))) == (2, 1)


def test_files_of_somebody_else_are_left_alone(tmp_path):
    write_run(tmp_path / "run", selection="single", done=0)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(UserError, match=r"exists already, and report\.md is none of this command"):
        main([str(tmp_path / "run"), "--out", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {"run", "report.html"}


def test_a_second_report_replaces_the_first_and_no_other_file(tmp_path, monkeypatch):
    publish(tmp_path, {"report.md": b"1", "figures/losses.png": b"1", "figures/old.png": b"1"})
    (tmp_path / "figures/holiday.png").write_text("mine")
    publish(tmp_path, {"report.md": b"2", "figures/losses.png": b"2"})
    left = {file.name: file.read_text() for file in tmp_path.rglob("*.*") if file.is_file()}
    assert left == {"report.md": "2\n![](figures/losses.png)\n", "losses.png": "2", "holiday.png": "mine"}

    def full_disk(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        publish(tmp_path, {"report.md": b"3"})
    assert (tmp_path / "report.md").read_text() == left["report.md"]
