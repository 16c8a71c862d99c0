"""A damaged file or a full disk ends a run with exit code 2 and one line on standard error, without a traceback."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from process_runs import config_file, prepare, start
from ready_process import REPOSITORY

import utils.files
from utils.cli import main_distill, main_single
from utils.command import EXIT_USER_ERROR, guarded
from utils.config import load_config
from utils.errors import UserError
from utils.processes.stopping import EXIT_INTERRUPTED, NOTHING_TO_SAVE
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir

Spoiling = Callable[[Path], Any]  # what is done to a file
TRACE = "you-have-been-had"  # the file that appears in the current folder where a file's code is run
SHORT = ["training.epochs=2", "training.save_every_steps=4", "training.lr_decay_epochs=[]"]
RESUMED = ["--resume", *SHORT]


class RunsCode:
    """What leaves a `TRACE` when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def text(content: str | bytes) -> Spoiling:
    """The file holds something else."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def saved(content: Any) -> Spoiling:
    """The file is a checkpoint of `content`."""
    return lambda path: torch.save(content, path)


def instead(put: Callable[[Path], Any]) -> Spoiling:
    """Something else is in the file's place."""
    return lambda path: (path.unlink(missing_ok=True), put(path))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Images, a teacher, and a run of one epoch that is to go on for another."""
    folder = prepare(tmp_path_factory.mktemp("prepared"))
    main_single(["--config", str(config_file(folder, None)), *SHORT, "training.epochs=1"])
    return folder


@pytest.fixture
def folder(prepared, tmp_path):
    """The same, to be spoilt."""
    return shutil.copytree(prepared, tmp_path / "folder")


@pytest.fixture
def started(folder):
    """The config of its run, and the run."""
    config = config_file(folder, None)
    return config, RunDir(load_config(config).run_dir)


@pytest.fixture
def run_main(capfd):
    """An entry point with the guard around it, in this process: exit code and standard error."""

    def call(config: Path, *words: str) -> tuple[int, str]:
        main = main_single if "None" in config.name else main_distill
        with pytest.raises(SystemExit) as ending:
            guarded(lambda: main(arguments=["--config", str(config), *words]))
        return ending.value.code, capfd.readouterr().err

    return call


@pytest.fixture
def refusal(run_main):
    """The one line that an entry point must end in."""

    def call(config: Path, *words: str) -> str:
        code, errors = run_main(config, *words)
        assert (code, errors[:7]) == (EXIT_USER_ERROR, "error: ")
        assert errors.removesuffix("\n").isprintable(), "one line"
        return errors.removesuffix("\n")

    return call


def put_torchscript(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # there is a newer way
        torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)).save(path)


def put_into_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("teacher.pth", "weights")


NO_CHECKPOINTS = {
    "missing": (Path.unlink, "No such file or directory"),
    "empty": (text(""), "refused, it is damaged, of another kind"),
    "device": (
        instead(lambda path: path.symlink_to("/dev/zero")),
        "is a folder, a link, a pipe or a device, expected a file",
    ),
    "pointer": (text("version https://git-lfs.github.com/spec/v1\noid x\n"), "is a Git LFS pointer"),
    "web page": (text("\n<!DOCTYPE html><title>404</title>"), "is an HTML or XML page"),
    "gzip": (text(gzip.compress(b"weights")), "is a gzip archive"),
    "TorchScript": (put_torchscript, "is a TorchScript program; torch.jit.load(FILE).state_dict() has its weights"),
    "zip": (put_into_zip, "is a zip archive"),
    "text": (text("accuracy: 74.3\n"), "refused, it is damaged, of another kind"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is cut off; its end is missing"),
    "code": (saved({"model": {}, "callbacks": [RunsCode()]}), "refused, it holds posix.system"),
    "a bare pickle": (text(pickle.dumps(RunsCode(), 2)), "refused, it is damaged"),
}


@pytest.mark.parametrize("kind", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint_is_refused_by_its_kind(tmp_path, monkeypatch, kind):
    spoil, complaint = NO_CHECKPOINTS[kind]
    path = tmp_path / "w.pth"
    torch.save({"weight": torch.ones(1000)}, path)
    spoil(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    assert complaint in str(error.value)
    assert not (tmp_path / TRACE).exists()


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), cut=st.booleans())
def test_any_damage_to_a_checkpoint_is_refused_in_one_line_or_does_no_harm(tmp_path_factory, place, value, cut):
    path = tmp_path_factory.getbasetemp() / "damaged.pth"
    torch.save({"model": {"weight": torch.ones(3), "name": "x"}, "epoch": 3}, path)
    content = bytearray(path.read_bytes())
    position = int(place * len(content))
    if cut:
        del content[position:]
    else:
        content[position] = value
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        assert isinstance(read_checkpoint(path), dict)


# Files in the folder of a run, how they are spoilt, and the complaint when it is resumed
ALL = ("ckpt/last.pth", "ckpt/previous.pth", "ckpt/epoch-1.pth", "ckpt/best.pth")
REFUSED = {
    "all checkpoints are broken": (ALL, text(""), "last.pth: refused, it is damaged"),
    "a link as log": (
        ("log.txt",),
        instead(lambda path: path.symlink_to("../precious")),
        "log.txt: is a folder, a link",
    ),
    "a pipe as lock": (
        (".lock",),
        instead(os.mkfifo),
        ".lock: is a folder, a link, a pipe or a device, expected a file",
    ),
}


class TestResuming:
    def test_falls_back_to_the_checkpoint_before_and_survives_garbage_in_the_records(self, started, run_main, caplog):
        config, run = started
        saved(RunsCode())(run.last)
        with run.metrics.open("ab") as file:
            file.write(b'\0\0\xff\n[1]\n{"global_epoch": "x"}\n{"global_epoch": 2')
        assert run_main(config, *RESUMED) == (0, "")
        assert f"{run.last}: refused, it holds posix.system" in caplog.text
        assert f"going on from {run.previous}\n" in caplog.text
        assert read_checkpoint(run.last)["progress"]["epoch"] == 2
        assert [json.loads(line)["epoch"] for line in run.metrics.read_text().splitlines()] == [1, 2]

    @pytest.mark.parametrize("kind", REFUSED)
    def test_is_refused(self, started, refusal, kind):
        config, run = started
        files, spoil, complaint = REFUSED[kind]
        precious = run.path.parent / "precious"
        precious.write_text("content")
        for file in files:
            spoil(run.path / file)
        assert complaint in refusal(config, *RESUMED)
        assert precious.read_text() == "content"

    def test_is_not_kept_waiting_by_the_children_of_a_dead_process(self, started):
        _, run = started
        holder = os.fork()
        if holder == 0:
            run.open(resume=True, overwrite=False)
            if os.fork() == 0:
                time.sleep(3)
            os._exit(0)
        os.waitpid(holder, 0)
        run.open(resume=True, overwrite=False)
        run.close()


class TestTheDisk:
    @pytest.mark.parametrize("where", ["log.txt", "metrics.jsonl", "events.out", "ckpt"])
    def test_that_is_full_is_noticed_by_each_writer(self, started, refusal, monkeypatch, where):
        config, run = started
        real_open, blocked = open, tuple(str(run.path / name) for name in (where, f".{where}"))

        def full(file, mode="r", *arguments, **options):
            if "r" not in mode and not isinstance(file, int) and os.fsdecode(file).startswith(blocked):
                file, mode = "/dev/full", mode.replace("x", "w")
            return real_open(file, mode, *arguments, **options)

        for name in ("builtins.open", "io.open"):
            monkeypatch.setattr(name, full)
        line = refusal(config, *RESUMED)
        monkeypatch.undo()
        assert "No space left on device" in line
        assert where == "events.out" or str(run.path / where) in line  # TensorBoard writes these
        assert read_checkpoint(run.last)["progress"]["epoch"] >= 1
        assert not list(run.last.parent.glob(utils.files.TEMPORARY))

    def test_that_cannot_be_written_to_is_refused_before_training(self, started, refusal):
        assert f"run.root, failed: {started[0]}/" in refusal(started[0], f"run.root={started[0]}")


def test_more_memory_than_there_is_is_one_line_with_advice(folder, refusal):
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    usual = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**29, usual[1]))  # so much more
    try:
        line = refusal(config_file(folder), "dataset.img_h=20000")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, usual)
    assert line.startswith("error: cpu: out of memory")
    assert "; a smaller training.batch_size, dataset.img_h or kd_loss.feat_dim takes less" in line


def test_a_full_disk_under_the_output_is_one_line():
    """With an interpreter of its own, which writes what is left when it ends."""
    program = "from utils.command import guarded; guarded(lambda: print('text'), trains=True)"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "error: No space left on device; checkpoints written before are kept\n"
    assert (done.returncode, done.stderr) == (EXIT_USER_ERROR, line)


def test_a_signal_before_training_is_one_line(folder):
    process = start(config_file(folder))
    process.wait_for_line()  # the first thing it tells is that it decodes the images
    process.send_signal(signal.SIGTERM)
    assert process.ending() == (EXIT_INTERRUPTED, NOTHING_TO_SAVE + "\n")
