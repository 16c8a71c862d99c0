"""Whole runs on a stand-in for a GPU, where PyTorch's CUDA backend is real and the values are not."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from utils.run_folder.folder import RunDir

SMALL = ["--dataset", "digits", "training.epochs=1", "training.batch_size=16", "validation.batch_size=60"]
TEACHER = ["train_single.py", "--model", "resnet8"]
STUDENTS = {name: ["train.py", "--net1", "resnet8", "--net2", "resnet8", "--distiller", name] for name in ("at", "crd")}
STEPS = 49  # of an epoch, the last one smaller


def train_in_turn(root, *commands):
    """Exit status of each command, and what the device saw of it."""
    import fakecuda

    found = []
    for script, *words in commands:
        sys.argv = [script, *words, *SMALL, f"run.root={root}"]
        fakecuda.reset()
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(script, run_name="__main__")
        found.append({"status": exit.value.code} | fakecuda.stats())
    return found


class TestEntryPoints:
    """A teacher, then adaptive students, by nothing but the commands of the README: ``training.device`` is auto."""

    @pytest.fixture
    def runs(self, stand_in, once, tmp_path_factory):
        def train():
            root = str(tmp_path_factory.mktemp("runs"))
            return root, stand_in.call(train_in_turn, root, TEACHER, *STUDENTS.values())

        root, found = once("entry points", train)
        folders = ["resnet8", *(f"adaptive-{name}/resnet8-resnet8" for name in STUDENTS)]
        return {folder: (RunDir(Path(root) / f"digits/1029/{folder}"), seen) for folder, seen in zip(folders, found)}

    def test_train_on_the_gpu(self, runs):
        for run, seen in runs.values():
            assert seen["status"] == 0
            assert run.result.exists()
            assert run.last.exists()
            assert seen["launches"] > 1000

    def test_capture_their_steps(self, runs):
        for run, seen in runs.values():
            assert seen["graph_launches"] == STEPS - 2  # the first one and the smaller last one are eager
            assert seen["violations"] == []
            assert seen["outside"] == {}
            assert "eagerly" not in run.log.read_text()
