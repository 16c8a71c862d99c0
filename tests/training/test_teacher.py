"""The teacher of a run: trained first if it is missing, checked before anything takes long, of the same classes."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from pictures import image_folder
from process_runs import fingerprint

import datasets.build
import datasets.check
from models import get_model
from utils.config import Config, find_config
from utils.config.related import teacher_run
from utils.errors import UserError
from utils.processes.stopping import Interrupted
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.engine import Engine
from utils.training.run import train

QUICK = ("training.epochs=1", "training.lr_decay_epochs=[]", "training.batch_size=8", "training.num_workers=0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), train=12, val=4, size=(16, 16))


def student(root: Path, images: Path, *words: str, distiller: str = "at") -> Config:
    places = (f"dataset.root={images}", f"run.root={root}", "dataset.img_h=16", "dataset.img_w=16", *QUICK)
    names = {"teacher": "resnet14", "student": "resnet8", "distiller": distiller}
    return find_config("imagefolder", 5, **names).load([*places, "validation.num_workers=0", *words])


def start(config: Config, **how) -> dict:
    return train(config, teacher_args=QUICK, **how)


@pytest.fixture(scope="module")
def together(images, tmp_path_factory):
    """A student after a teacher that is trained in the same process; the folders of both runs."""
    config = student(tmp_path_factory.mktemp("together"), images, "kd_loss.options.negatives=8", distiller="crd")
    start(config)
    return RunDir(config.teacher_checkpoint.parents[1]), RunDir(config.run_dir)


class TestTrainedAlong:
    def test_an_unfinished_one_is_resumed_also_by_the_plain_command(self, images, tmp_path, together, monkeypatch):
        config = student(tmp_path, images, "kd_loss.options.negatives=8", distiller="crd")
        with monkeypatch.context() as patch:
            step = Engine._step
            patch.setattr(Engine, "_step", lambda *all_of_it: [step(*all_of_it), os.kill(os.getpid(), signal.SIGTERM)])
            with pytest.raises(Interrupted, match="stopped in train 1/1 after step 1/3, all saved"):
                start(config)
            with pytest.raises(Interrupted, match="stopped in train 1/1 after step 2/3, all saved"):
                start(config)
        log = RunDir(config.teacher_checkpoint.parents[1]).log.read_text()
        assert log.count("all saved; the same command with --resume goes on") == 2
        logging.getLogger("sakd").info("line of the student")  # as the entry points log before a run
        start(config, resume=True)
        teacher, run = RunDir(config.teacher_checkpoint.parents[1]), RunDir(config.run_dir)
        assert ["line of the student" in folder.log.read_text() for folder in (teacher, run)] == [False, True]
        assert (fingerprint(teacher), fingerprint(run)) == tuple(map(fingerprint, together))

    def test_a_stop_that_comes_with_its_last_step_does_not_begin_the_student(self, images, tmp_path, monkeypatch):
        config = student(tmp_path, images)
        write = RunDir.write_result
        monkeypatch.setattr(
            RunDir, "write_result", lambda *all_of_it: [write(*all_of_it), os.kill(os.getpid(), signal.SIGTERM)]
        )
        with pytest.raises(Interrupted, match=r"stopped after the training of the teacher, which is in .*resnet14;"):
            start(config)
        assert not config.run_dir.exists()

    def test_weights_that_somebody_put_in_its_place_are_taken(self, images, tmp_path, caplog):
        caplog.set_level(logging.INFO, "sakd")
        config = student(tmp_path, images)
        config.teacher_checkpoint.parent.mkdir(parents=True)
        torch.save(get_model("resnet14", 2).state_dict(), config.teacher_checkpoint)
        start(config)
        assert sorted(os.listdir(config.teacher_checkpoint.parent)) == ["best.pth"]
        assert "teacher_args (--teacher-arg) changes nothing: no teacher is to be trained" in caplog.messages

    def test_without_a_config_to_train_it_by_the_line_says_what_would_do(self, images, tmp_path, monkeypatch):
        config = student(tmp_path, images)
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=r"no such teacher checkpoint, and training one .* no dataset .* another"):
            train(config)


WRONG = {
    "the student's name": (["kd.student.name=nowhere.Nope"], "nowhere"),
    "the student's weights": (["kd.student.checkpoint=nowhere.pth"], "nowhere.pth"),
    "the spots": (["kd_loss.spots=[[9, 9]]"], r"kd_loss\.spots.*: the student of resnet14-resnet8 has features"),
    "an option of the distiller": (["kd_loss.options.power=2"], "power"),
    "what the device cannot do": (["training.cuda_graph=true"], "cuda_graph"),
    "the batch size": (["training.batch_size=1"], "training.batch_size"),
    "the number of classes": (["dataset.num_classes=3"], "num_classes"),
}


class TestCheckedFirst:
    @pytest.mark.parametrize("what", WRONG)
    def test_nothing_is_trained_or_decoded_if_this_is_wrong(self, images, tmp_path, monkeypatch, what):
        def decode(*_, **__):
            raise AssertionError("images are decoded")

        monkeypatch.setattr(datasets.build, "decode_all", decode)
        monkeypatch.setattr(datasets.check, "find_unreadable", decode)
        words, complaint = WRONG[what]
        with pytest.raises(UserError, match=complaint):
            start(student(tmp_path / "run", images, "dataset.on_corrupt=skip", *words))
        assert not (tmp_path / "run").exists()

    def test_a_folder_that_is_taken_is_refused_before_the_teacher_is_trained(self, images, tmp_path):
        config = student(tmp_path, images)
        RunDir(config.run_dir).open(resume=False, overwrite=False)
        (config.run_dir / "ckpt/last.pth").touch()
        with pytest.raises(UserError, match="holds an unfinished run already"):
            start(config)
        assert not config.teacher_checkpoint.parent.exists()


class TestKnowsTheData:
    def test_every_checkpoint_says_what_it_was_trained_on(self, together):
        for run in together:
            for file in (run.best, run.last):
                data = read_checkpoint(file)["data"]
                assert (data["classes"], data["image_size"]) == (["ant", "bee"], [16, 16])
                assert (len(data["mean"]), len(data["std"])) == (3, 3)

    @pytest.fixture
    def other_root(self, tmp_path, together):
        """A folder of runs with a copy of the teacher in it."""
        shutil.copytree(together[0].path, tmp_path / "run/imagefolder/5/resnet14")
        return tmp_path / "run"

    @pytest.mark.parametrize(
        ("classes", "complaint"),
        [
            (("ant", "bee", "cat"), r"2 classes, here 3, and number 2 is missing, here 'cat'"),
            (("aardvark", "ant", "bee"), r"2 classes, here 3, and number 0 is 'ant', here 'aardvark'"),
        ],
    )
    def test_a_teacher_of_other_classes_is_refused(self, tmp_path, other_root, classes, complaint):
        others = image_folder(tmp_path / "others", train=4, val=2, size=(16, 16), classes=classes)
        with pytest.raises(UserError, match=rf"best.pth: the teacher resnet14 knows other .*: {complaint}"):
            start(student(other_root, others))
        assert not (other_root / "imagefolder/5/adaptive-at").exists()
        named = f"kd.teacher.checkpoint={other_root / 'imagefolder/5/resnet14/ckpt/best.pth'}"
        with pytest.raises(UserError, match=rf"{complaint}.*; name one of these classes, "):
            start(student(other_root, others, named))

    @pytest.mark.parametrize(
        ("word", "said"),
        [
            ("dataset.mean=[0.1, 0.2, 0.3]", "prepared in another way: mean [0."),
            ("training.lr=0.01", None),
        ],
    )
    def test_images_that_it_saw_prepared_in_another_way_are_one_line(self, images, other_root, caplog, word, said):
        train(student(other_root, images, word))
        warnings = [line for line in caplog.messages if "prepared in another way" in line]
        assert [said in line for line in warnings] == ([] if said is None else [True])

    def test_that_it_saw_other_images_is_one_line_unless_its_file_is_named(self, tmp_path, images, other_root, caplog):
        moved = shutil.copytree(images, tmp_path / "moved")
        teacher, line = other_root / "imagefolder/5/resnet14", f"was trained on dataset.root={images}, here"
        for place in (f"kd.teacher.checkpoint={teacher}", f"dataset.root={images}/../{images.name}"):
            train(student(other_root, moved, place), overwrite=True)
        assert line not in caplog.text
        train(student(other_root, moved), overwrite=True)
        assert f"warning: the teacher in {teacher} {line} {moved}; a dataset.label" in caplog.text

    def test_a_run_is_not_resumed_on_other_classes(self, tmp_path, images, together):
        shutil.copytree(together[0].path.parents[2], tmp_path / "run")
        others = image_folder(tmp_path / "others", train=12, val=4, size=(16, 16), classes=("ant", "cat"))
        alone = teacher_run(student(tmp_path / "run", others), ["training.epochs=3"]).config
        with pytest.raises(UserError, match="its checkpoint knows other classes than the data set"):
            train(alone, resume=True)
