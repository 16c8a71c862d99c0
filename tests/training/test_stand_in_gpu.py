"""Training on a stand-in for a GPU, where PyTorch's CUDA backend is real and the values are not.

The functions at the top run in a process that sees the GPU, see `stand_in.StandIn`; the tests look at what they return.
"""

from __future__ import annotations

import gc
import runpy
import sys
import traceback
from contextlib import nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path

import pytest
import torch
from toy_runs import toy_config
from toys import NUM_CLASSES, NUM_SAMPLES, toy_batch, toy_task

from datasets.batch import Batch
from distillers import DISTILLERS
from utils.run_folder.folder import RunDir
from utils.training.cuda_graph import CudaRecorder, waiting_refused
from utils.training.device import autocast, choose_device
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter
from utils.training.optim import make_optimizers
from utils.training.step import Phase, make_step

SMALL = ["--dataset", "digits", "training.epochs=1", "training.batch_size=16", "validation.batch_size=60"]
DIGITS_STEPS = 49  # of an epoch, the last one smaller
SIZES = [8, 8, 5, 8, 5, 11]
BATCH, EPOCHS, STEPS = 12, 3, 4  # of toy runs: three batches of 12 of the 40 images, and one of 4


# ---- in a process that sees the GPU


def all_answers(folder):
    """What every question below is answered with, or the traceback of what went wrong."""
    import fakecuda

    answers = {}
    for name, question in QUESTIONS.items():
        fakecuda.reset()
        gc.collect()
        torch.cuda.empty_cache()
        try:
            answers[name] = question(f"{folder}/{name}")
        except BaseException:
            answers[name] = {"problem": traceback.format_exc()}
    return answers


def run_entry_points(folder):
    """A teacher, then students, by the commands of the README: ``training.device`` is auto."""
    import fakecuda

    found = {}
    for name, words in COMMANDS.items():
        fakecuda.reset()
        status, errors = run_command(*words, f"run.root={folder}")
        found[name] = fakecuda.stats() | {"status": status, "errors": errors}
    return found


COMMANDS = {"resnet8": ["train_single.py", "--model", "resnet8", *SMALL]} | {
    f"adaptive-{name}/resnet8-resnet8": f"train.py --net1 resnet8 --net2 resnet8 --distiller {name}".split() + SMALL
    for name in ("at", "crd")
}


def run_command(script, *words):
    """Exit code and standard error of an entry point."""
    sys.argv = [script, *words]
    with redirect_stderr(StringIO()) as errors:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as leaving:
            return leaving.code, errors.getvalue()


class Training:
    """A toy task with everything that a step needs."""

    def __init__(self, distiller="at", precision="fp32", captured=True):
        self.device = choose_device("auto")
        self.task = toy_task(distiller).to(self.device)
        self.complaints = []
        meter = Meter(self.device)
        gates = GateRecorder(list(self.task.gate_labels), NUM_CLASSES, NUM_SAMPLES, self.device)
        phase = Phase("train", self.task, 1, make_optimizers(self.task.parameter_groups(), toy_config()))
        recorder = CudaRecorder(self.device) if captured else None
        context = lambda: autocast(self.device, precision)  # noqa: E731
        self.step = make_step(phase, meter, gates, context, recorder, self.complaints.append)

    def take(self, sizes, before=nullcontext):
        batches = [toy_batch(size, seed=seed) for seed, size in enumerate(sizes)]
        batches = [Batch(*(value.to(self.device) for value in batch)) for batch in batches]
        with before():
            for batch in batches:
                self.step(batch)
        return self


def capture_every_distiller(folder):
    import fakecuda

    found = {}
    for distiller in sorted(set(DISTILLERS)):
        for precision in ("fp32", "bf16"):
            fakecuda.reset()
            training = Training(distiller, precision).take(SIZES)
            seen = fakecuda.stats()
            training.take(SIZES, waiting_refused)
            found[f"{distiller} {precision}"] = {
                "complaints": training.complaints,
                "replays": seen["graph_launches"],
                "violations": seen["violations"],
                "outside": seen["outside"],
            }
    return found


QUESTIONS = {
    "entry points": run_entry_points,
    "distillers": capture_every_distiller,
}


# ---- what it says


@pytest.fixture
def answer(stand_in, once, tmp_path_factory):
    """Of the question called so."""

    def ask():
        folder = str(tmp_path_factory.mktemp("stand-in"))
        return folder, stand_in.call(all_answers, folder)

    folder, answers = once("stand-in", ask)

    def find(name):
        assert "problem" not in answers[name], answers[name]["problem"]
        return Path(folder) / name, answers[name]

    return find


class TestEntryPoints:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_train_on_the_gpu_with_captured_steps(self, answer, name):
        folder, found = answer("entry points")
        run = RunDir(folder / "digits/1029" / name)
        assert found[name]["status"] == 0, found[name]["errors"]
        assert run.result.exists()
        assert "eagerly" not in run.log.read_text()
        assert found[name]["graph_launches"] == DIGITS_STEPS - 1
        assert found[name]["violations"] == []
        assert found[name]["outside"] == {}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("distiller", sorted(set(DISTILLERS)))
def test_every_distiller_is_captured(answer, distiller, precision):
    found = answer("distillers")[1][f"{distiller} {precision}"]
    assert found == {"complaints": [], "replays": len(SIZES) - 1, "violations": [], "outside": {}}
