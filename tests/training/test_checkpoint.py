"""Writing checkpoints safely, and reading weights from wherever they come."""

import fcntl
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from toys import ToyNet

from utils.errors import UserError
from utils.files import publish_copy
from utils.run_folder.checkpoint import read_checkpoint, save_atomically
from utils.run_folder.folder import RunDir
from utils.run_folder.weights import head_keys, load_weights


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a | b)


def moved(model: nn.Module) -> nn.Module:
    """`model` with every entry of its state_dict changed."""
    for value in model.state_dict().values():
        value.add_(1)
    return model


class Malicious:
    def __reduce__(self):
        return os.system, ("touch you-have-been-had",)


class TestLoadWeights:
    @pytest.mark.parametrize(
        "wrap",
        [
            pytest.param(lambda weights: weights, id="bare state_dict"),
            pytest.param(lambda weights: {"model": weights, "epoch": 240}, id="under model"),
            pytest.param(lambda weights: {"state_dict": weights}, id="under state_dict"),
            pytest.param(lambda weights: {"model": {f"module.{k}": v for k, v in weights.items()}}, id="data parallel"),
        ],
    )
    def test_accepts_every_common_layout(self, tmp_path, wrap):
        trained, fresh = moved(ToyNet()), ToyNet()
        torch.save(wrap(trained.state_dict()), tmp_path / "w.pth")
        load_weights(fresh, tmp_path / "w.pth")
        assert same(fresh.state_dict(), trained.state_dict())

    def test_accepts_files_from_before_batch_counts(self, tmp_path):
        trained, fresh = moved(ToyNet()), ToyNet()
        weights = {key: value for key, value in trained.state_dict().items() if "num_batches" not in key}
        torch.save({"model": weights}, tmp_path / "w.pth")
        load_weights(fresh, tmp_path / "w.pth")
        assert all(torch.equal(fresh.state_dict()[key], value) for key, value in weights.items())

    def test_leaves_a_new_head_alone_whatever_its_width(self, tmp_path):
        trained, fresh = moved(ToyNet(num_classes=1000)), ToyNet(num_classes=5)
        before = fresh.fc.weight.clone()
        torch.save(trained.state_dict(), tmp_path / "w.pth")
        load_weights(fresh, tmp_path / "w.pth", new_head=True)
        assert torch.equal(fresh.fc.weight, before)
        assert torch.equal(fresh.conv3.weight, trained.conv3.weight)
        assert head_keys(fresh) == {"fc.weight", "fc.bias"}

    @pytest.mark.parametrize(
        ("content", "complaint"),
        [
            (lambda: ToyNet(width=6).state_dict(), r"conv1.weight has shape \(6, 3, 3, 3\), expected \(4, 3, 3, 3\)"),
            (lambda: ToyNet(num_classes=9).state_dict(), r"fc.weight has shape \(9, 8\), expected \(5, 8\)"),
            (lambda: nn.Linear(3, 4).state_dict(), "lacks conv1.weight and"),
            (lambda: ToyNet().state_dict() | {"extra.weight": torch.ones(1)}, "the unknown extra.weight"),
            (lambda: ToyNet().state_dict() | {"fc.bias": torch.full((5,), torch.nan)}, "fc.bias holds NaN"),
            (lambda: ToyNet().state_dict() | {"fc.bias": [1, 2]}, "fc.bias is a list, expected a tensor"),
            (lambda: [1, 2, 3], "holds a list, expected a dictionary"),
        ],
        ids=["width", "classes", "another network", "too much", "nan", "no tensor", "no dictionary"],
    )
    def test_refuses_what_does_not_match_in_one_line(self, tmp_path, content, complaint):
        path, model = tmp_path / "w.pth", ToyNet()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        torch.save(content(), path)
        with pytest.raises(UserError, match=complaint) as error:
            load_weights(model, path, name="the teacher toy")
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)
        assert same(model.state_dict(), before)

    @pytest.mark.parametrize(
        "make",
        [
            pytest.param(lambda path: path.write_bytes(b""), id="empty"),
            pytest.param(lambda path: path.write_text("accuracy: 74.3\n"), id="text"),
            pytest.param(lambda path: path.mkdir(), id="folder"),
            pytest.param(lambda path: None, id="missing"),
            pytest.param(lambda path: path.write_bytes(os.urandom(3000)), id="noise"),
            pytest.param(lambda path: path.write_bytes(b"PK\x03\x04" + b"\0" * 200), id="broken zip"),
        ],
    )
    def test_refuses_what_is_no_checkpoint_in_one_line(self, tmp_path, make):
        path = tmp_path / "w.pth"
        make(path)
        with pytest.raises(UserError) as error:
            load_weights(ToyNet(), path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
    def test_refuses_a_truncated_file(self, tmp_path, share):
        path = tmp_path / "w.pth"
        torch.save(ToyNet().state_dict(), path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
        with pytest.raises(UserError):
            load_weights(ToyNet(), path)

    @pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
    def test_never_runs_code_that_a_file_brings(self, tmp_path, monkeypatch, write):
        monkeypatch.chdir(tmp_path)
        path = tmp_path / "w.pth"
        write({"model": Malicious()}, path)
        with pytest.raises(UserError, match=r"w\.pth"):
            load_weights(ToyNet(), path)
        assert not (tmp_path / "you-have-been-had").exists()


class TestSaving:
    def test_leaves_nothing_but_the_file(self, tmp_path):
        save_atomically({"a": torch.ones(3)}, tmp_path / "last.pth")
        assert [path.name for path in tmp_path.iterdir()] == ["last.pth"]
        assert torch.equal(read_checkpoint(tmp_path / "last.pth")["a"], torch.ones(3))

    def test_keeps_the_old_file_when_writing_fails(self, tmp_path, monkeypatch):
        path = tmp_path / "last.pth"
        save_atomically({"epoch": 1}, path)

        def full(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot write the checkpoint.*No space left"):
            save_atomically({"epoch": 2}, path)
        assert read_checkpoint(path) == {"epoch": 1}
        assert len(list(tmp_path.iterdir())) == 1

    def test_a_copy_does_not_follow_later_checkpoints(self, tmp_path):
        last, best = tmp_path / "last.pth", tmp_path / "best.pth"
        save_atomically({"epoch": 1}, last)
        publish_copy(last, best)
        save_atomically({"epoch": 2}, last)
        assert read_checkpoint(best) == {"epoch": 1}


class TestRunDir:
    def test_refuses_to_write_over_a_run_unless_told(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        run.save({"epoch": 1}, is_best=True)
        with pytest.raises(UserError, match=r"unfinished run already; --resume .* --overwrite"):
            RunDir(tmp_path / "run").refuse_if_taken()

    def test_goes_on_from_what_somebody_kept(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        run.config.touch()
        run.save({"epoch": 1}, is_best=True)
        run.save({"epoch": 2}, epoch=2)
        run.save({"epoch": 10}, epoch=10)
        for kept in (10, 2, 1):
            run.last.unlink()
            run.previous.unlink(missing_ok=True)
            run.close()
            with pytest.raises(UserError, match="holds an unfinished run already"):
                RunDir(tmp_path / "run").open(resume=False, overwrite=False)
            assert run.open(resume=True, overwrite=False) == read_checkpoint(run.last) == {"epoch": kept}
            run.epoch_checkpoint(kept).unlink(missing_ok=True)

    def test_a_kill_within_the_first_save_leaves_something_to_go_on_from(self, tmp_path, monkeypatch):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
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

    def test_lets_alone_what_is_no_checkpoint_of_a_run(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.checkpoints.mkdir(parents=True)
        run.config.touch()
        (run.checkpoints / "mine.pth").touch()
        with pytest.raises(UserError, match="nothing to resume there"):
            run.open(resume=True, overwrite=False)
        assert run.open(resume=False, overwrite=False) is None
        assert (run.checkpoints / "mine.pth").exists()

    def test_refuses_to_write_over_weights_that_somebody_put_there(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.checkpoints.mkdir(parents=True)
        run.best.touch()
        with pytest.raises(
            UserError, match=r"holds best\.pth, but no run that it is of \(no config\.yml\); move it away"
        ):
            run.open(resume=False, overwrite=False)

    def test_refuses_a_folder_that_a_living_process_writes_to(self, tmp_path):
        RunDir(tmp_path / "other").open(resume=False, overwrite=False)
        first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
        first.open(resume=False, overwrite=False)
        with pytest.raises(UserError, match="another run is writing there"):
            second.open(resume=False, overwrite=True)

    def test_waits_for_somebody_who_looks_whether_it_is_busy(self, tmp_path):
        (tmp_path / ".lock").touch()
        with (tmp_path / ".lock").open() as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            timer = threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN))
            timer.start()
            RunDir(tmp_path).open(resume=False, overwrite=False)
            timer.join()

    def test_hands_back_the_newest_readable_checkpoint(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        run.save({"epoch": 1}, is_best=True)
        run.save({"epoch": 2}, is_best=False)
        assert read_checkpoint(run.last) == {"epoch": 2}
        assert read_checkpoint(run.best) == {"epoch": 1}
        run.last.write_bytes(run.last.read_bytes()[:100])
        del run
        assert RunDir(tmp_path / "run").open(resume=True, overwrite=False) == {"epoch": 1}

    def test_has_nothing_to_resume_in_an_empty_folder(self, tmp_path):
        with pytest.raises(UserError, match="nothing to resume"):
            RunDir(tmp_path / "run").open(resume=True, overwrite=False)

    def test_overwriting_drops_everything_of_the_old_run(self, tmp_path):
        run = RunDir(tmp_path / "run")
        run.open(resume=False, overwrite=False)
        run.save({"epoch": 1}, is_best=True)
        run.metrics.write_text("{}\n")
        run.write_result({"best": 1})
        del run
        fresh = RunDir(tmp_path / "run")
        assert fresh.open(resume=False, overwrite=True) is None
        assert not any(path.exists() for path in (fresh.last, fresh.best, fresh.metrics, fresh.result))
