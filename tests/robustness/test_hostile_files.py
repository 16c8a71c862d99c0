"""Whatever is wrong with the files of a run or with the disk: exit code 2, one line on standard error, no traceback."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pictures import save, smooth_picture
from process_runs import config_file, prepare, start

import utils.files
from datasets.loading import decode as decoding
from models import get_model
from utils.cli import main_distill, main_single
from utils.command import EXIT_USER_ERROR, guarded
from utils.config import load_config
from utils.errors import UserError
from utils.processes.stopping import EXIT_INTERRUPTED, NOTHING_TO_SAVE
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.run_folder.weights import load_weights


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def folder(prepared, tmp_path):
    """Images and a teacher, to be spoilt."""
    return shutil.copytree(prepared, tmp_path / "folder")


@pytest.fixture
def run_main(capfd):
    """An entry point with the guard around it, in this process: exit code and standard error."""

    def call(config: Path, *words: str, main=main_distill) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ending:
            guarded(lambda: main(arguments=["--config", str(config), *words]))
        return ending.value.code, capfd.readouterr().err

    return call


@pytest.fixture
def refusal(run_main):
    """The one line that an entry point must end in."""

    def call(config: Path, *words: str, main=main_distill) -> str:
        code, errors = run_main(config, *words, main=main)
        assert code == EXIT_USER_ERROR
        assert errors.startswith("error: ")
        assert errors.removesuffix("\n").isprintable(), "one line"
        return errors.removesuffix("\n")

    return call


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch you-have-been-had",)


def weights(**options) -> dict[str, torch.Tensor]:
    return get_model(options.pop("name", "resnet8"), options.pop("classes", 2)).state_dict() | options


TEACHERS = {
    "missing": (lambda path: path.unlink(), "no such teacher checkpoint"),
    "empty": (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "is a folder, expected a file"),
    "pipe": (lambda path: (path.unlink(), os.mkfifo(path)), "is a pipe, expected a file"),
    "device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero")), "is a device, expected a file"),
    "a sum of numbers": (lambda path: path.write_bytes(b"\x80\x02h\x65."), "not a readable checkpoint (KeyError: 101)"),
    "text": (lambda path: path.write_text("accuracy: 74.3\n"), "teacher.pth: "),
    "image": (lambda path: save(smooth_picture(9, 9), path.with_suffix(".png")).replace(path), "teacher.pth: "),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:100_000]), "not a readable checkpoint"),
    "without its end": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not a readable checkpoint"),
    "code": (lambda path: torch.save({"model": RunsCode()}, path), "refused, it holds posix.system"),
    "code, old": (lambda path: path.write_bytes(pickle.dumps(RunsCode(), 2)), "refused, it holds posix.system"),
    "code, new": (lambda path: path.write_bytes(pickle.dumps(RunsCode())), "refused, it is damaged, or holds more"),
    "module": (
        lambda path: torch.save(torch.nn.Linear(2, 2), path),
        "refused, it holds torch.nn.modules.linear.Linear",
    ),
    "number": (lambda path: torch.save(3, path), "holds a int, expected a dictionary of weights"),
    "tensor": (lambda path: torch.save(torch.ones(3), path), "holds a Tensor, expected a dictionary of weights"),
    "empty dictionary": (lambda path: torch.save({}, path), "the file lacks conv1.weight and 46 more"),
    "another network": (lambda path: torch.save(weights(name="resnet14"), path), "the file has the unknown layer"),
    "other classes": (
        lambda path: torch.save(weights(classes=9), path),
        "fc.weight has shape (9, 64), expected (2, 64)",
    ),
    "NaN": (lambda path: torch.save(weights(**{"fc.bias": torch.full((2,), torch.nan)}), path), "fc.bias holds NaN"),
    "infinite": (
        lambda path: torch.save(weights(**{"fc.bias": torch.full((2,), torch.inf)}), path),
        "fc.bias holds NaN",
    ),
    "no tensor": (
        lambda path: torch.save(weights(**{"fc.bias": [0, 0]}), path),
        "fc.bias is a list, expected a tensor",
    ),
    "whole numbers": (
        lambda path: torch.save(weights(**{"fc.bias": torch.ones(2, dtype=int)}), path),
        "fc.bias is torch.i",
    ),
    "complex": (
        lambda path: torch.save(weights(**{"fc.bias": torch.ones(2) * 1j}), path),
        "fc.bias is torch.complex64",
    ),
    "sparse": (lambda path: torch.save(weights(**{"fc.bias": torch.ones(2).to_sparse()}), path), "torch.sparse_coo"),
    "shapes alone": (
        lambda path: torch.save(weights(**{"fc.bias": torch.ones(2, device="meta")}), path),
        "fc.bias is torch.float32, torch.strided on meta",
    ),
    "one name twice": (
        lambda path: torch.save(weights(**{"module.fc.bias": torch.ones(2)}), path),
        "holds two entries for one, fc.bias and module.fc.bias",
    ),
    "another prefix": (
        lambda path: torch.save({f"net.{key}": value for key, value in weights().items()}, path),
        "; this makes a file that can be loaded: python -m utils.convert import",
    ),
    "expanded": (
        lambda path: torch.save(weights(**{"fc.bias": torch.ones(1).expand(2)}), path),
        "fc.bias is (2,) expanded from fewer values",
    ),
    "names that are none": (lambda path: torch.save({3: torch.ones(2), None: 1}, path), "the file lacks conv1.weight"),
    "a name of two lines": (lambda path: torch.save(weights(**{"a\nb": torch.ones(2)}), path), "the unknown a\\nb"),
}


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_teacher_that_is_none_is_refused(folder, refusal, monkeypatch, kind):
    spoil, complaint = TEACHERS[kind]
    spoil(folder / "teacher.pth")
    config = config_file(folder)
    monkeypatch.chdir(folder)
    assert f"{folder}/teacher.pth: " in (line := refusal(config))
    assert complaint in line
    assert not (folder / "run").exists(), "nothing is written before everything is built"
    assert not (folder / "you-have-been-had").exists()


def test_a_device_that_is_called_safetensors_is_not_read(tmp_path):
    (tmp_path / "x.safetensors").symlink_to("/dev/zero")
    with pytest.raises(UserError, match="is a device, expected a file"):
        read_checkpoint(tmp_path / "x.safetensors")


def test_a_file_name_of_two_lines_is_told_in_one(folder, refusal):
    (folder / "tea\ncher.pth").write_bytes(b"")
    config = config_file(folder)
    name = json.dumps(str(folder / "tea\ncher.pth"))
    assert "tea\\ncher.pth: not a readable checkpoint" in refusal(config, f"kd.teacher.checkpoint={name}")


_quick = settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@_quick
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
    assert reads_or_says_why(path)


def reads_or_says_why(path: Path) -> bool:
    """Whether a checkpoint is read or refused in one line that names it; any other exception comes through."""
    try:
        return isinstance(read_checkpoint(path), dict)
    except UserError as error:
        return str(error).startswith(f"{path}: ") and str(error).isprintable()


GOOD_TEACHERS = {
    "bare": lambda weights: weights,
    "model": lambda weights: {"model": weights, "epoch": 240},
    "data parallel": lambda weights: {"state_dict": {f"module.{key}": value for key, value in weights.items()}},
    "no counters": lambda weights: {"model": {k: v for k, v in weights.items() if "num_batches" not in k}},
    "NumPy figures": lambda weights: {"model": weights, "best_acc": np.float64(74.6), "top5": np.float32(93)},
}


@pytest.mark.parametrize("kind", GOOD_TEACHERS)
def test_a_teacher_of_any_common_layout_is_accepted(folder, kind):
    expected = torch.load(folder / "teacher.pth", weights_only=True)
    torch.save(GOOD_TEACHERS[kind](expected), folder / "teacher.pth")
    teacher = get_model("resnet8", 2)
    load_weights(teacher, folder / "teacher.pth")
    assert all(torch.equal(value, expected[key]) for key, value in teacher.state_dict().items())


@pytest.fixture(scope="module")
def interrupted(prepared, tmp_path_factory):
    """A folder with a run of one epoch that is to go on for another."""
    folder = shutil.copytree(prepared, tmp_path_factory.mktemp("interrupted") / "folder")
    main_single(["--config", str(config_file(folder, None)), *SHORT, "training.epochs=1"])
    return folder


SHORT = ["training.epochs=2", "training.save_every_steps=4", "training.lr_decay_epochs=[]"]


@pytest.fixture
def started(interrupted, tmp_path):
    """Its config and its run, moved here."""
    folder = shutil.copytree(interrupted, tmp_path / "started")
    config = config_file(folder, None)
    return config, RunDir(load_config(config).run_dir)


class TestResuming:
    @pytest.mark.parametrize(
        ("spoil", "found"),
        [
            (lambda path: path.unlink(), "no such checkpoint"),
            (lambda path: path.write_bytes(b""), "not a readable checkpoint"),
            (lambda path: path.write_bytes(path.read_bytes()[:5000]), "not a readable checkpoint"),
            (lambda path: path.write_text("no checkpoint"), "refused, it is damaged"),
            (lambda path: torch.save(RunsCode(), path), "refused, it holds posix.system"),
        ],
        ids=["missing", "empty", "torn", "text", "code"],
    )
    def test_falls_back_to_the_checkpoint_before_with_a_line(self, started, run_main, caplog, spoil, found):
        config, run = started
        spoil(run.last)
        assert run_main(config, "--resume", *SHORT, main=main_single) == (0, "")
        assert f"{run.last}: {found}" in caplog.text
        assert f"going on from {run.previous}, the one before" in caplog.text
        assert read_checkpoint(run.last)["progress"]["epoch"] == 2

    def test_is_refused_when_both_are_broken(self, started, refusal):
        config, run = started
        for path in (run.last, run.previous):
            path.write_bytes(b"")
        assert "not a readable checkpoint" in refusal(config, "--resume", *SHORT, main=main_single)

    @pytest.mark.parametrize(
        "content",
        [
            {},
            {"model": {}},
            {"format": 2},
            {"format": 1, "progress": 3},
            {"format": 1, "progress": {"phase": 7, "epoch": 0, "step": 0}},
            {"format": 1, "progress": {"phase": 0, "epoch": 0, "step": 0}, "model": {}, "extra": None},
        ],
        ids=str,
    )
    def test_is_refused_from_what_is_no_checkpoint_of_a_run(self, started, refusal, content):
        config, run = started
        torch.save(content, run.last)
        assert "its checkpoint is not of this configuration" in refusal(config, "--resume", *SHORT, main=main_single)

    def test_survives_garbage_in_the_records(self, started, run_main):
        config, run = started
        with run.metrics.open("ab") as file:
            file.write(b'\0\0\xff\n[1]\n{"global_epoch": "x"}\n{"global_epoch": 2')
        assert run_main(config, "--resume", *SHORT, main=main_single) == (0, "")
        assert [json.loads(line)["epoch"] for line in run.metrics.read_text().splitlines()] == [1, 2]

    def test_is_refused_while_another_process_holds_the_folder(self, started, refusal):
        config, run = started
        run.open(resume=True, overwrite=False)
        assert "another run is writing there right now" in refusal(config, "--resume", *SHORT, main=main_single)
        run.close()

    @pytest.mark.parametrize("name", [".lock", "log.txt", "metrics.jsonl", "gates.jsonl"])
    def test_writes_through_no_link_that_somebody_has_put_there(self, started, refusal, tmp_path, name):
        config, run = started
        (tmp_path / "precious").write_text("content")
        (run.path / name).unlink(missing_ok=True)
        (run.path / name).symlink_to(tmp_path / "precious")
        assert f"{run.path / name}: is a symbolic link, expected a file" in refusal(
            config, "--resume", main=main_single
        )
        assert (tmp_path / "precious").read_text() == "content"

    def test_is_not_kept_waiting_by_a_pipe_in_place_of_the_lock(self, started, refusal):
        config, run = started
        run.lock.unlink()
        os.mkfifo(run.lock)
        assert ".lock: is a pipe, expected a file" in refusal(config, "--resume", main=main_single)

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
    def check_kept(self, run):
        assert read_checkpoint(run.last)["progress"]["epoch"] >= 1
        assert not list(run.last.parent.glob(utils.files.TEMPORARY))

    @pytest.mark.parametrize("limit", [2500, 20_000, 400_000])
    def test_that_is_full_ends_the_run_and_keeps_the_last_checkpoint(self, started, refusal, limit):
        config, run = started
        usual = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, usual[1]))  # real writes fail, as on a full disk
        try:
            line = refusal(config, "--resume", *SHORT, "training.save_every_steps=1", main=main_single)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        assert "File too large" in line
        self.check_kept(run)

    @pytest.mark.parametrize("where", ["log.txt", "metrics.jsonl", "events.out", "config.yml", "ckpt"])
    def test_that_is_full_is_noticed_by_whoever_writes_first(self, started, refusal, monkeypatch, where):
        config, run = started
        real_open, blocked = open, tuple(str(run.path / name) for name in (where, f".{where}"))

        def full(file, mode="r", *arguments, **options):
            if "r" not in mode and not isinstance(file, int) and os.fsdecode(file).startswith(blocked):
                file, mode = "/dev/full", mode.replace("x", "w")
            return real_open(file, mode, *arguments, **options)

        for name in ("builtins.open", "io.open"):
            monkeypatch.setattr(name, full)
        line = refusal(config, "--resume", *SHORT, main=main_single)
        monkeypatch.undo()
        assert "No space left on device" in line
        self.check_kept(run)

    def test_of_a_few_bytes_is_no_match_for_a_run(self, started, refusal, tmp_path):
        config, _ = started
        disk = tmp_path / "disk"
        disk.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", "size=500k", "tmpfs", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mounting, capture_output=True).returncode:
            pytest.skip("needs the right to mount a small file system")
        try:
            line = refusal(config, f"run.root={disk}", *SHORT, main=main_single)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        assert "No space left on device" in line

    def test_that_is_read_only_is_refused_before_training(self, started, refusal):
        config, run = started
        shutil.rmtree(run.path)
        run.path.parent.chmod(0o555)
        with unprivileged(config.parent):
            line = refusal(config, *SHORT, main=main_single)
        assert line == f"error: {run.path}: cannot write there (Permission denied); run.root=<folder> names another"

    def test_that_has_a_file_where_the_folder_should_be_is_refused(self, started, refusal):
        config, _ = started
        assert "cannot write there (Not a directory)" in refusal(config, f"run.root={config}", main=main_single)


@contextlib.contextmanager
def unprivileged(folder: Path):
    """Not as root, whom no permission stops; `folder` and pytest's own ones above it are opened for that."""
    if os.geteuid() != 0:
        yield
        return
    for closed in (folder, *folder.parents):
        if not closed.stat().st_mode & 0o001:
            closed.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


class TestInput:
    def test_an_unreadable_image_is_refused_and_named(self, folder, refusal):
        (folder / "images" / "train" / "ant" / "003.png").write_bytes(b"no picture")
        assert "train/ant/003.png: cannot be read as an image (damaged" in refusal(config_file(folder))

    def test_an_unreadable_image_may_be_skipped(self, folder, run_main, caplog):
        (folder / "images" / "train" / "ant" / "003.png").write_bytes(b"no picture")
        words = ["dataset.on_corrupt=skip", "training.epochs=1", "training.lr_decay_epochs=[]"]
        assert run_main(config_file(folder), *words) == (0, "")
        assert "1 of 64 training images skipped, the first: " in caplog.text

    def test_an_empty_class_is_refused_and_named(self, folder, refusal):
        (folder / "images" / "train" / "cow").mkdir()
        assert "no images in class folder cow" in refusal(config_file(folder))

    def test_a_loss_without_bounds_ends_the_run_and_keeps_the_last_good_checkpoint(self, started, refusal):
        config, run = started
        before = read_checkpoint(run.last)["model"]
        line = refusal(config, "--resume", *SHORT, "training.lr=1e30", "training.save_every_steps=1", main=main_single)
        assert "no longer finite, at train epoch 2 step " in line
        assert f"the last good checkpoint is {run.last}" in line
        kept = read_checkpoint(run.last)["model"]
        assert all(value.isfinite().all() for value in kept.values())
        assert kept.keys() == before.keys()

    @pytest.mark.parametrize(
        "words", [["kd_loss.name=cc", "kd_loss.feat_dim=100000000"], ["dataset.img_h=200000"]], ids=" ".join
    )
    def test_that_needs_more_memory_than_there_is_is_refused_with_advice(self, folder, refusal, words):
        usual = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, usual[1]))  # machines may promise memory they do not have
        try:
            line = refusal(config_file(folder), *words)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, usual)
        assert line.startswith("error: cpu: out of memory")
        assert line.endswith(
            "; a smaller training.batch_size, dataset.img_h or kd_loss.feat_dim takes less, and so does "
            "training.precision=bf16"
        )

    def test_a_worker_that_dies_is_told(self, started, refusal, monkeypatch):
        monkeypatch.setattr(decoding.Decoder, "_decode", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        line = refusal(started[0], "--overwrite", "training.num_workers=1", main=main_single)
        assert "a process that decodes images died" in line

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (b"", "the file is empty"),
            (os.urandom(10_000_000), "not YAML: "),
            (b"dataset: {name: digits}\ndataset: {name: digits}\n", "stands here a second time"),
            (b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases are not read here"),
            (
                b"dataset: !!python/object/apply:os.system [touch you-have-been-had]\n",
                "could not determine a constructor for the tag",
            ),
            (b"dataset:\n\tname: digits\n", "cannot start any token"),
            (b"a: " + b"[" * 100_000, "nested too deeply"),
        ],
        ids=["empty", "10 MB", "duplicate key", "anchor bomb", "tag", "tab", "nested"],
    )
    def test_a_file_that_is_no_config_is_refused(self, tmp_path, refusal, content, complaint):
        config = tmp_path / "x.yml"
        config.write_bytes(content)
        assert complaint in refusal(config)


class TestProcesses:
    """What only a process of its own shows: its exit code, and that the interpreter adds nothing on its way out."""

    def ending(self, process) -> tuple[int, str]:
        _, errors = process.communicate(timeout=60)
        return process.returncode, errors

    def test_a_broken_teacher_is_one_line(self, folder):
        (folder / "teacher.pth").write_bytes(b"")
        code, errors = self.ending(start(config_file(folder)))
        assert code == EXIT_USER_ERROR
        assert errors.count("\n") == 1

    def test_a_full_disk_under_the_output_is_one_line(self, folder):
        with open("/dev/full", "w") as full:
            code, errors = self.ending(start(config_file(folder), stdout=full))
        assert (code, errors) == (
            EXIT_USER_ERROR,
            "error: No space left on device; checkpoints written before are kept\n",
        )

    def test_a_disk_that_takes_nothing_at_all_is_one_line(self, folder):
        limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
        code, errors = self.ending(start(config_file(folder), preexec_fn=limit))
        assert code == EXIT_USER_ERROR
        assert "File too large" in errors
        assert errors.count("\n") == 1

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_before_training_is_one_line(self, folder, number):
        process = start(config_file(folder))
        process.stdout.readline()  # the first thing it tells is that it decodes the images
        process.send_signal(number)
        assert self.ending(process) == (EXIT_INTERRUPTED, NOTHING_TO_SAVE + "\n")
