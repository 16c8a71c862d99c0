"""Stopping and dying at the awkward moments: between two renames, in evaluation, while a checkpoint is written."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import signal
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from toy_runs import STEPS, PowerCut, assert_equal, at_step, finish, make_engine, records, toy_config

import utils.files
import utils.run_folder.folder
from utils.errors import UserError
from utils.files import TEMPORARY, write_text
from utils.processes.stopping import STOP_SIGNALS, Interrupted, StopRequest
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.log import log_to_file

KEEPING = {"epochs": 2, "lr_decay_epochs": [1], "save_every_steps": 2, "save_ep_freq": 1, "keep_checkpoints": 1}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that was left alone."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(make_engine(folder, config=toy_config(**KEEPING)))
    return RunDir(folder)


def check_resumed(folder, whole):
    torch.manual_seed(99)  # a new process has another random state
    (folder / "ckpt/.last.pth.1.tmp").write_text("half of it")  # what a process leaves that is killed while it writes
    finish(make_engine(folder, resume=RunDir(folder).last.exists(), config=toy_config(**KEEPING)))
    run = RunDir(folder)
    names = sorted(path.name for path in run.last.parent.iterdir())
    assert names == ["best.pth", "epoch-2.pth", "last.pth", "previous.pth"]
    for name in names:
        assert_equal(read_checkpoint(run.last.with_name(name)), read_checkpoint(whole.last.with_name(name)))
    assert records(run) == records(whole)
    assert not list(folder.rglob(TEMPORARY))


def stop_me(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def cut_power():
    raise PowerCut


def preceded(call, at, action=stop_me):
    """`call`, preceded by `action` when it is called for the time number `at`."""
    times = itertools.count(1)

    def wrapped(*arguments, **options):
        if next(times) == at:
            action()
        return call(*arguments, **options)

    return wrapped


# Two saves within the first epoch, the one at its end, and that at the end of the second, which deletes an old one
@pytest.mark.parametrize(
    ("kind", "name", "at"), [*((Path, "replace", at) for at in (*range(1, 8), 12, 13, 14)), (RunDir, "prune", 6)]
)
def test_dying_before_any_rename_or_deletion_loses_nothing(tmp_path, whole, monkeypatch, kind, name, at):
    engine = make_engine(tmp_path / "run", config=toy_config(**KEEPING))
    with monkeypatch.context() as patch:
        patch.setattr(kind, name, preceded(getattr(kind, name), at, cut_power))
        with pytest.raises(PowerCut):
            finish(engine)
    check_resumed(tmp_path / "run", whole)


def signal_in_checkpoint(number):
    def arrange(engine, patch):
        folder = utils.run_folder.folder
        patch.setattr(folder, "save_atomically", preceded(folder.save_atomically, number))

    return arrange


def signal_in_step(number):
    return lambda engine, patch: at_step(engine, STEPS + 3, before=partial(stop_me, number))


def signal_before_the_first_step(engine, patch):
    patch.setattr(engine.task, "start_epoch", preceded(engine.task.start_epoch, 1))


def signal_in_evaluation(engine, patch):
    val = engine.data.val

    def batches(epoch):
        first, *_ = type(val).epoch(val, epoch)
        stop_me()
        yield first
        raise AssertionError("goes on evaluating")

    patch.setattr(val, "epoch", batches)


STOPS = {
    "before the first step": (signal_before_the_first_step, {"epoch": 0, "step": 1}),
    **{f"in a step, by {number.name}": (signal_in_step(number), {"epoch": 1, "step": 3}) for number in STOP_SIGNALS},
    "in a checkpoint within an epoch": (signal_in_checkpoint(1), {"epoch": 0, "step": 2}),
    "in evaluation": (signal_in_evaluation, {"epoch": 0, "step": STEPS}),
    "in the checkpoint of an epoch": (signal_in_checkpoint(3), {"epoch": 1, "step": 0}),
}


class TestStopping:
    @pytest.mark.parametrize("moment", STOPS)
    def test_saves_and_takes_no_step_more(self, tmp_path, whole, monkeypatch, moment):
        arrange, progress = STOPS[moment]
        engine = make_engine(tmp_path / "run", config=toy_config(**KEEPING))
        before = list(map(signal.getsignal, STOP_SIGNALS))
        with monkeypatch.context() as patch:
            arrange(engine, patch)
            with pytest.raises(Interrupted, match="all saved; the same command with --resume goes on"):
                finish(engine)
        assert list(map(signal.getsignal, STOP_SIGNALS)) == before
        assert read_checkpoint(engine.run.last)["progress"] == {"phase": 0} | progress
        check_resumed(tmp_path / "run", whole)

    def test_in_the_last_checkpoint_of_all_lets_the_run_end(self, tmp_path, monkeypatch):
        engine = make_engine(tmp_path / "run", config=toy_config(**KEEPING))
        signal_in_checkpoint(6)(engine, monkeypatch)
        assert "last_top1" in finish(engine)


@pytest.mark.parametrize(
    ("every", "at", "is_stopped", "complaint"),
    [
        (1, 2, False, r"noticed at train epoch 1 step 2: fc\.bias; the last good .*last"),
        (None, STEPS, False, r"step 5: fc\.bias; nothing is saved yet"),
        (None, 2, True, r"step 2: fc\.bias; nothing is saved yet"),
    ],
)
def test_weights_that_are_not_finite_are_not_saved(tmp_path, every, at, is_stopped, complaint):
    """The loss of a step is computed before the step: it may be the weights that go first."""
    engine = make_engine(tmp_path / "run", config=toy_config(save_every_steps=every))

    def poison():
        engine.task.student.fc.bias.data[0] = torch.inf
        if is_stopped:
            stop_me()

    at_step(engine, at, after=poison)
    with pytest.raises(UserError, match=complaint):
        finish(engine)
    assert engine.run.last.exists() == bool(every)
    assert not every or read_checkpoint(engine.run.last)["progress"]["step"] == 1


@pytest.mark.parametrize(("keep", "names"), [(None, [1, 2, 10]), (2, [2, 10]), (9, [1, 2, 10])])
def test_the_newest_checkpoints_of_epochs_are_kept(tmp_path, keep, names):
    run = RunDir(tmp_path / "run")
    run.open(resume=False, overwrite=False)
    other = run.last.with_name("epoch-final.pth")
    other.touch()
    for epoch in (1, 2, 10):
        run.save({}, epoch=epoch, keep=keep)
    assert run.kept_epochs() == [run.epoch_checkpoint(epoch) for epoch in names]
    assert other.exists()


class TestAFolderThatIsGone:
    """It is deleted or moved while a run trains there, and another run may begin in its place."""

    @pytest.mark.parametrize(
        ("how", "at"),
        [(shutil.rmtree, STEPS + 1), (lambda folder: folder.rename(folder.with_name("elsewhere")), 2 * STEPS)],
    )
    def test_ends_its_run_which_writes_nothing_into_that_of_another(self, tmp_path, how, at):
        engine = make_engine(tmp_path / "run", config=toy_config(save_every_steps=2))
        other = RunDir(tmp_path / "run")

        def lose():
            how(tmp_path / "run")
            other.open(resume=False, overwrite=False)
            other.save({"of": "the other run"})
            other.metrics.touch()

        at_step(engine, at, before=lose)
        lost = pytest.raises(UserError, match="was moved or deleted while this run")
        with lost, StopRequest() as stop, log_to_file(engine.run.log):
            engine.fit(stop)
        engine.run.close()
        other.close()
        assert read_checkpoint(other.last) == {"of": "the other run"}
        assert other.metrics.read_text() == ""
        assert not other.gates.exists()
        assert not other.log.exists()

    def test_gets_no_result_of_the_run_before(self, tmp_path):
        run, other = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        shutil.rmtree(tmp_path / "run")
        for there in (False, True):
            if there:
                other.open(resume=False, overwrite=False)
            with pytest.raises(UserError, match="was moved or deleted"):
                run.write_result({})
        assert not other.result.exists()


class TestAFileSystemThatCannot:
    @staticmethod
    def failing(number, function, concerns):
        def fail(what, *arguments):
            if concerns(what):
                raise OSError(number, os.strerror(number))
            return function(what, *arguments)

        return fail

    def test_flush_a_folder_is_warned_of_once(self, tmp_path, monkeypatch, caplog):
        for number in (errno.EINVAL, errno.EIO):
            with monkeypatch.context() as patch:
                fsync = self.failing(number, os.fsync, lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode))
                patch.setattr(os, "fsync", fsync)
                if number == errno.EIO:
                    with pytest.raises(OSError, match="Input/output"):
                        write_text(tmp_path / "file", "text")
                else:
                    for _ in range(2):
                        write_text(tmp_path / "file", "text")
        assert (tmp_path / "file").read_text() == "text"
        assert caplog.messages == [
            f"{tmp_path}: this file system cannot flush a folder; a power cut may undo the newest files there"
        ]

    @pytest.mark.parametrize("number", [errno.EPERM, errno.ENOLCK])
    def test_lock_is_trained_on_with_a_warning(self, tmp_path, monkeypatch, caplog, number):
        monkeypatch.setattr(fcntl, "flock", self.failing(number, fcntl.flock, lambda file: True))
        run = RunDir(tmp_path)
        run.open(resume=False, overwrite=False)
        run.save({"epoch": 1})
        assert read_checkpoint(run.last) == {"epoch": 1}
        assert "has no locks; do not start a second run there" in caplog.text


def test_a_finished_run_that_goes_on_is_not_finished_any_more(tmp_path):
    first = make_engine(tmp_path / "run")
    first.run.write_result(finish(first))
    engine = make_engine(tmp_path / "run", resume=True, config=toy_config(epochs=4))
    engine.task.start_epoch = preceded(engine.task.start_epoch, 1)
    with pytest.raises(Interrupted):
        finish(engine)
    assert not engine.run.result.exists()
