"""The launchers, run as people run them: with variables in the environment and arguments behind."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from launchers import HERE, quick_sh, sh
from pictures import image_folder
from process_runs import fingerprint
from ready_process import REPOSITORY

from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir

TINY = ("dataset.img_h=16", "training.epochs=1", "training.batch_size=8", "training.num_workers=0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    image_folder(folder, train=12, val=4, size=(16, 16))
    return folder


class TestDistilling:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, images, tmp_path_factory):
        """``train.sh`` and ``train_anti.sh``, from nothing; elsewhere ``train_single.sh`` and ``train.sh``."""
        cls.root, cls.elsewhere = tmp_path_factory.mktemp("launched"), tmp_path_factory.mktemp("else where")
        names = {"dataset": "imagefolder", "seed": "7", "net1": "resnet14", "net2": "resnet8", "distiller": "sp"}
        own = "training.epochs=1 training.lr=0.01 training.num_workers=0 training.batch_size=8"
        cls.keys, cls.names = (*TINY, f"dataset.root={images}"), names | {"teacher_args": own}
        cls.first = quick_sh("train.sh", *cls.keys, f"run.root={cls.root}", **cls.names)
        cls.anti = quick_sh("train_anti.sh", *cls.keys, f"run.root={cls.root}", **cls.names)
        there = f"run.root={cls.elsewhere}"
        data = {"dataset": "imagefolder", "seed": "7", "model": "resnet14"}
        cls.single = quick_sh("train_single.sh", cls.keys[0], cls.keys[-1], there, *own.split(), **data)
        cls.teacher = fingerprint(RunDir(cls.elsewhere / "imagefolder/7/resnet14"))
        (cls.elsewhere / "imagefolder/7/resnet14/result.json").unlink()
        cls.second = quick_sh("train.sh", *cls.keys, there, **cls.names)
        return cls.root / "imagefolder/7"

    def test_trains_the_missing_teacher_first_and_says_so(self, folder):
        assert self.first.returncode == 0, self.first.stderr
        lines = self.first.stdout.splitlines()
        said = "teacher resnet14 is missing: training it first, with training.epochs=1; teacher_args=training.epochs="
        assert any(line.startswith(said) for line in lines)
        teacher = json.loads((folder / "resnet14/result.json").read_text())
        assert teacher["checkpoint"].endswith("resnet14/ckpt/best.pth")
        config = read_checkpoint(folder / "resnet14/ckpt/best.pth")["config"]
        assert config["training"]["lr"] == 0.01  # teacher_args reached the teacher
        assert config["dataset"]["img_h"] == 16  # and so did the student's view of the data

    def test_teacher_and_student_are_the_same_if_the_teacher_was_trained_alone_and_interrupted(self, folder):
        assert self.single.returncode == 0, self.single.stderr
        assert fingerprint(RunDir(folder / "resnet14")) == self.teacher
        assert self.second.returncode == 0, self.second.stderr
        assert "teacher resnet14 is unfinished: going on with it" in self.second.stdout
        student = "adaptive-sp/resnet14-resnet8"
        assert fingerprint(RunDir(self.elsewhere / "imagefolder/7" / student)) == fingerprint(RunDir(folder / student))

    def test_writes_where_the_names_say_and_takes_the_teacher_that_is_there_the_second_time(self, folder):
        assert self.anti.returncode == 0, self.anti.stderr
        assert "training it first" not in self.anti.stdout
        for selection in ("adaptive", "anti"):
            run = folder / f"{selection}-sp/resnet14-resnet8"
            assert (run / "ckpt/last.pth").exists()
            assert (run / "ckpt/best.pth").exists()
            assert read_checkpoint(run / "ckpt/last.pth")["config"]["kd"]["selection"] == selection
            assert read_checkpoint(run / "ckpt/last.pth")["config"]["training"]["seed"] == 7

    def test_ends_by_saying_what_came_out_and_what_to_run_next(self, folder):
        text = self.first.stdout
        assert "best val " in text
        assert "teacher resnet14: val" in text
        assert f"checkpoint: {folder}/adaptive-sp/resnet14-resnet8/ckpt/best.pth" in text
        assert "composed from" in text  # there is no config file of this pair
        (following,) = (line for line in self.second.stdout.splitlines() if line.startswith("next: "))
        variables = "dataset=imagefolder seed=7 net1=resnet14 net2=resnet8 distiller=sp sh train.sh"
        assert following.startswith(f"next: {variables} --teacher-arg training.epochs=1")
        words = shlex.split(following)
        assert {self.keys[-1], f"run.root={self.elsewhere}", "dataset.img_h=16"} < set(words)
        assert words[-1] == "kd.selection=fixed"

    def test_remembers_how_each_run_was_started(self, folder):
        commands = [json.loads(path.read_text())["command"] for path in sorted(folder.rglob("facts.json"))]
        scripts = [shlex.split(command)[shlex.split(command).index("sh") + 1] for command in commands]
        assert scripts == ["train.sh", "train_anti.sh", "train_single.sh"]

    def test_never_overwrites_a_run_silently(self, folder):
        for words, said in (((), ""), (("kd.balance=2",), " with other settings (kd.balance is 2.0, it was 0.5)")):
            again = quick_sh("train.sh", *self.keys, *words, f"run.root={self.root}", **self.names)
            assert again.returncode == 2
            (line,) = again.stderr.splitlines()
            assert f"holds a finished run already{said}; --resume" in line


@pytest.mark.parametrize(
    ("script", "entry", "says"),
    [
        ("train.sh", "train_anti.py", "spot-adaptive knowledge"),
        ("train_anti.sh", "train.py", "(anti-SAKD)"),
    ],
)
def test_a_variable_of_the_environment_does_not_choose_the_program(script, entry, says):
    run = sh(script, "--help", entry=entry, model="vgg8")
    assert run.stdout.startswith("model=vgg8 changes nothing here; net1 is the teacher, and net2 the student")
    assert run.stdout.count(f"usage: {script.replace('.sh', '.py')} ") == 1
    assert says in run.stdout


class TestEnvironment:
    """The interpreter that the launchers choose. Making a real one takes minutes: CI does that, these use stand-ins."""

    @pytest.fixture
    def checkout(self, tmp_path):
        """What `utils/python.sh` needs, and a launcher that only says which interpreter it got."""
        (tmp_path / "utils").mkdir()
        for file in ("utils/python.sh", "utils/check_requirements.py", "requirements.txt"):
            shutil.copy(REPOSITORY / file, tmp_path / file)
        text = 'set -eu\nrequirements=requirements.txt\n. utils/python.sh\necho "chosen: $python"\n'
        (tmp_path / "launch.sh").write_text(text)
        return tmp_path

    @staticmethod
    def bare_python(folder: Path) -> str:
        """A python3 without any package, whose venv module makes one that has them all, and which counts its calls."""
        folder.mkdir()
        script = folder / "python3"
        script.write_text(
            f"""#!/bin/sh
case "$0 $1 $2" in
    *" -m venv") echo made >> venv.log; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    *" -m pip") echo "$@" >> pip.log ;;
    .venv/*) exec {sys.executable} "$@" ;;
    *) exec {sys.executable} -S "$@" ;;
esac
"""
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        return str(folder)

    def test_is_the_python_on_the_path_if_that_has_everything_else_one_made_once(self, checkout):
        assert sh("launch.sh", cwd=checkout).stdout == f"chosen: {HERE}/python3\n"
        assert not (checkout / ".venv").exists()
        path = self.bare_python(checkout / "bare")
        none = {"VIRTUAL_ENV": "", "CONDA_DEFAULT_ENV": ""}
        first, second = (sh("launch.sh", cwd=checkout, path=path, **none) for _ in range(2))
        assert re.search(r"lacks torch>=.*, numpy>=.*: installing into \.venv, once", first.stdout)
        assert first.stdout.endswith("using .venv/bin/python\nchosen: .venv/bin/python\n")
        assert second.stdout == "using .venv/bin/python\nchosen: .venv/bin/python\n"
        assert (checkout / "venv.log").read_text() == "made\n"
        assert "install --quiet --requirement requirements.txt" in (checkout / "pip.log").read_text()

    @pytest.mark.parametrize("active", [{"VIRTUAL_ENV": "/mine"}, {"CONDA_PREFIX": "/mine", "CONDA_DEFAULT_ENV": "x"}])
    def test_changes_no_active_environment_but_names_what_it_lacks(self, checkout, active):
        path = self.bare_python(checkout / "bare")
        run = sh("launch.sh", cwd=checkout, path=path, **({"VIRTUAL_ENV": ""} | active))
        assert run.returncode == 2
        (line,) = run.stderr.splitlines()
        assert line.startswith("error: the active environment /mine lacks torch>=")
        assert f"{path}/python3 -m pip install --quiet --requirement requirements.txt" in line
        assert not (checkout / "venv.log").exists()

    def test_asks_for_a_python_where_there_is_none(self, checkout):
        tools = checkout / "tools"
        tools.mkdir()
        (tools / "sh").symlink_to(shutil.which("sh"))
        run = subprocess.run(
            [shutil.which("sh"), "launch.sh"], cwd=checkout, env={"PATH": str(tools)}, capture_output=True, text=True
        )
        assert run.returncode == 2
        assert run.stderr == "error: no python3 on the path; install Python 3.10 or newer\n"

    def test_a_requirement_is_met_by_a_newer_version_alone(self):
        from utils.check_requirements import lacking

        assert lacking("# a comment\n\nnumpy>=1.0\ntorch >= 2.0  # and another\n") == []
        assert lacking("numpy>=999\nno-such-package>=1\npytest\n") == ["numpy>=999", "no-such-package>=1"]


def test_cdpath_leads_no_launcher_into_another_folder(tmp_path):
    for folder in ("here", "elsewhere"):
        (tmp_path / folder / "copy/utils").mkdir(parents=True)
        (tmp_path / folder / "copy/utils/python.sh").write_text(f"echo {folder}; exit\n")
    for launcher in REPOSITORY.glob("train*.sh"):
        shutil.copy(launcher, tmp_path / "here/copy")
        run = sh(f"copy/{launcher.name}", cwd=tmp_path / "here", CDPATH=str(tmp_path / "elsewhere"))
        assert run.stdout == "here\n"
