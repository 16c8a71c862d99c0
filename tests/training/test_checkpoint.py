"""Writing checkpoints so that none is lost, and the folder of a run that they are in."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from utils.errors import UserError
from utils.files import append_line
from utils.run_folder.checkpoint import read_checkpoint, save_atomically
from utils.run_folder.folder import RunDir


def test_a_file_is_on_disk_before_it_takes_its_name_and_its_folder_then(tmp_path, monkeypatch):
    events, replace = [], Path.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(Path, "replace", lambda path, target: events.append("named") or replace(path, target))
    save_atomically({"epoch": 1}, tmp_path / "last.pth")
    append_line(tmp_path / "lines", "a line")
    file, lines, folder = (path.stat().st_ino for path in (tmp_path / "last.pth", tmp_path / "lines", tmp_path))
    assert events == [file, "named", folder, lines]


class TestRunDir:
    @pytest.fixture
    def run(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        return run

    def test_goes_on_from_what_somebody_kept(self, run):
        run.config.touch()
        run.save({"epoch": 1}, is_best=True)
        run.save({"epoch": 2}, epoch=2)
        run.save({"epoch": 10}, epoch=10)
        for kept in (10, 2, 1):
            run.last.unlink()
            run.previous.unlink(missing_ok=True)
            run.close()
            with pytest.raises(UserError, match="holds an unfinished run already"):
                RunDir(run.path).open(resume=False, overwrite=False)
            assert run.open(resume=True, overwrite=False) == read_checkpoint(run.last) == {"epoch": kept}
            assert read_checkpoint(run.path) == {"epoch": 1}, "a folder stands for its best epoch"
            run.epoch_checkpoint(kept).unlink(missing_ok=True)

    def test_a_kill_within_the_first_save_leaves_something_to_go_on_from(self, run, monkeypatch):
        run.config.touch()

        def killed(path: Path, target: Path):
            if target == run.last:
                raise KeyboardInterrupt
            os.replace(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                run.save({"epoch": 1}, is_best=True)
        assert [path.name for path in run.checkpoints.iterdir()] == ["best.pth"]
        run.close()
        assert run.open(resume=True, overwrite=False) == {"epoch": 1}

    def test_refuses_to_write_over_weights_that_somebody_put_there(self, run):
        run.close()
        (run.checkpoints / "mine.pth").touch()
        run.best.touch()
        with pytest.raises(UserError, match=r"holds best\.pth, but no run that it is of \(no config\.yml\)"):
            run.open(resume=False, overwrite=False)
        run.best.unlink()
        run.open(resume=False, overwrite=False)
        assert (run.checkpoints / "mine.pth").exists()

    def test_refuses_a_folder_that_a_living_process_writes_to(self, run):
        with pytest.raises(UserError, match="another run is writing there"):
            RunDir(run.path).open(resume=False, overwrite=True)

    def test_waits_for_somebody_who_looks_whether_it_is_busy(self, tmp_path):
        (tmp_path / ".lock").touch()
        with (tmp_path / ".lock").open() as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            timer = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
            timer.start()
            RunDir(tmp_path).open(resume=False, overwrite=False)
            timer.join()

    def test_overwriting_drops_everything_of_the_old_run(self, run):
        run.save({"epoch": 1}, is_best=True)
        run.metrics.write_text("{}\n")
        run.write_result({"best": 1})
        (run.path / "events.out.tfevents.2").touch()
        run.close()
        assert run.open(resume=False, overwrite=True) is None
        assert not any(path.exists() for path in (run.last, run.best, run.metrics, run.result, *run.event_files()))
