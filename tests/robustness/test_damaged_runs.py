"""Run folders with a damaged file: one warning line names it, and every tool goes on with the rest."""

import os
import shutil

import numpy as np
import pytest
from made_up_runs import write_run, write_samples

from utils.files import warn_once
from utils.grid.plan import plan, state
from utils.grid.progress import epochs_done
from utils.report.__main__ import main as report
from utils.run_folder.read import find_runs, read_run

RECORD = b'{"phase": "train", "epoch": %d, "seconds": 1, "train": {}, "val": {"top1": %s}}\n'
PIPE = object()
ALL, NO_GATES, NO_SAMPLES = (True, True), (False, True), (True, False)

# Name: file; its new content, or what in it is replaced once by what; a word of the warning; how far the run is then,
# None: it is left out; whether there are gate shares and gate samples.
DAMAGES = {
    "NUL bytes": ("metrics.jsonl", (b"\n", b"\n\0\0\0\n"), "line 2", "finished 4/4", ALL),
    "a word": ("metrics.jsonl", RECORD % (4, b'"x"'), "'x'", "stopped 0/4", ALL),
    "cut off": ("metrics.jsonl", slice(-40), "line 4", "stopped 3/4", ALL),
    "pipe": ("metrics.jsonl", PIPE, "is a folder, a link, a pipe or a device, expected a file", "stopped 0/4", ALL),
    "list as result": ("result.json", b"[]", "list", "stopped 4/4", ALL),
    "foreign facts": ("facts.json", b'{"image_size": 3}', "reading", "finished 4/4", ALL),
    "unknown selection": ("config.yml", (b"adaptive", b"clever"), "unknown selection clever", None, ALL),
    "list as rate": ("config.yml", (b"  lr: 0.05", b"  lr: [1, {b: 2}]"), "", "finished 4/4", ALL),
    "config not YAML": ("config.yml", b"{", "line 1, column 2", None, ALL),
    "foreign gates": ("gates.jsonl", b'{"global_epoch": 1}\n', "line 1", "finished 4/4", NO_GATES),
    "half the samples": ("gates/epoch-4.npz", slice(300), "reading", "finished 4/4", NO_SAMPLES),
}


def damage(file, how):
    content = file.read_bytes()
    if isinstance(how, slice):
        how = content[how]
    elif isinstance(how, tuple):
        how = content.replace(*how, 1)
        assert how != content
    file.unlink()
    os.mkfifo(file) if how is PIPE else file.write_bytes(how)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A good run, and one for each kind of damage."""
    root = tmp_path_factory.mktemp("runs")
    folders = {}
    for seed, name in enumerate(["good", *DAMAGES]):
        folder = folders[name] = write_run(root / str(seed), selection="adaptive", seed=seed)
        write_samples(folder, 4, np.ones((6, 4)), ["f1", "f2", "f3", "logits"])
        if name in DAMAGES:
            file, how, *_ = DAMAGES[name]
            damage(folder / file, how)
    return folders


@pytest.fixture(autouse=True)
def _nothing_was_said_before():
    warn_once.cache_clear()


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_named_in_one_line_and_the_rest_is_read(folders, caplog, name):
    file, _, complaint, progress, left = DAMAGES[name]
    run = read_run(folders[name])
    found = run and (run.progress, (run.gate_shares() is not None, run.gate_samples() is not None))
    assert found == (progress and (progress, left))
    lines = caplog.messages
    assert len(lines) == bool(complaint)
    assert not complaint or (str(folders[name] / file) in lines[0] and complaint in lines[0] and "left out" in lines[0])


def test_a_value_that_is_not_finite_does_not_stop_anything(tmp_path):
    folder = write_run(tmp_path, selection="fixed", accuracies=[50, 60, 70, 60])
    file = folder / "metrics.jsonl"
    for old, new in ((b'"top1": 70.0', b'"top1": 1e999'), (b'"top1": 50.0', b'"top1": NaN')):
        file.write_bytes(file.read_bytes().replace(old, new))
    with file.open("ab") as stream:
        stream.write(RECORD % (5, b"null"))
    run = read_run(folder)
    assert (run.epochs_done, run.best_top1) == (5, 60)
    assert np.isnan(run.last_top1)


def test_the_report_is_of_all_that_can_be_read(folders, tmp_path):
    roots = [str(folder.parents[3]) for folder in folders.values()]
    assert report([*roots, "--out", str(tmp_path), "--no-plots"]) == 0
    page = (tmp_path / "report.md").read_text()
    read = {name for name, (*_, progress, _) in DAMAGES.items() if progress} | {"good"}
    assert {name for name, folder in folders.items() if str(folder) in page} == read


def test_a_grid_goes_on_with_damaged_runs(folders, caplog):
    jobs = {}
    for seed, (name, folder) in enumerate(folders.items()):
        words = [f"run.root={folder.parents[3]}", "training.epochs=4"]
        *_, jobs[name] = plan("digits", ["adaptive"], ["at"], ["resnet20-resnet8"], [seed], words)
        assert jobs[name].folder == folder
    found = {name: state(job).status for name, job in jobs.items()}
    finished = {name for name, (*_, progress, _) in DAMAGES.items() if (progress or "").startswith("finished")}
    assert {name for name, status in found.items() if status == "finished"} == finished | {"good"}
    assert set(found.values()) == {"finished", "unfinished"}
    assert sum(map(epochs_done, jobs.values())) > 0
    lines = len(caplog.messages)
    assert [state(job).status for job in jobs.values()] == list(found.values())
    assert len(caplog.messages) == lines, "a folder is named once, however often the grid looks at it"


def test_a_path_longer_than_the_system_takes_stops_nothing(tmp_path, monkeypatch):
    good = write_run(tmp_path / "good", selection="single")
    monkeypatch.chdir(tmp_path)
    for _ in range(17):  # more than 4,096 bytes in all
        os.mkdir("d" * 250)
        os.chdir("d" * 250)
    shutil.copytree(good, "run")
    assert [run.path for run in find_runs([tmp_path])] == [good]
