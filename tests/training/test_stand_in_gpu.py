"""Training on a stand-in for a GPU, where PyTorch's CUDA backend is real and the values are not.

The functions at the top run in a process that sees the GPU, see `stand_in.StandIn`; the tests look at what they return.
"""

from __future__ import annotations

import gc
import importlib
import json
import random
import runpy
import socket
import sys
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import get_args
from unittest import mock

import pytest
import torch
from gpu_runs import BATCH, WaitsOnlyInACapture, is_captured, little_memory, make_engine, steps_on_gpu, trained
from stand_in import in_forks
from toy_runs import RECIPE, PowerCut, cut_power_after, finish, records, toy_config
from toys import ToyNet, toy_data

from distillers import DISTILLERS
from distillers.at import AT
from distillers.spot_adaptive.selection import SELECTIONS
from utils.config.training import Optimizer
from utils.errors import UserError
from utils.processes.group import is_main, process_group
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.cuda_graph import CudaRecorder, waiting_refused
from utils.training.device import choose_device, set_up

SMALL = ["--dataset", "digits", "training.epochs=2", "training.batch_size=64", "validation.batch_size=60"]
DIGITS_STEPS = 26  # of two epochs; the last one of each is smaller
COMMANDS = {
    "resnet8": ["train_single.py", "--model", "resnet8", *SMALL],
    "adaptive-at/resnet8-resnet8": ["train.py", "--net1", "resnet8", "--net2", "resnet8", "--distiller", "at", *SMALL],
}
IMPORTED = ("torch._dynamo", "torch.distributed.nn.functional", "sklearn.datasets")  # shared by forks
WORKSPACES = (32 * 2**20, 2**20)  # bytes that cuBLAS keeps for a stream, and in PyTorch 2.11 cuBLASLt
KINDS = {  # of captures: precision, sizes of the batches, and options of the toy task
    **{(distiller, "deterministic"): ("bf16", [8, 8], {}) for distiller in sorted(set(DISTILLERS))},
    **{("at", selection): ("fp32", [8, 8], {"selection": selection}) for selection in sorted(SELECTIONS)},
    ("crd", "sizes"): ("fp32", [8, 8, 5, 8, 5], {}),
    **{(distiller, "balanced"): ("fp32", [8] * 5, {"balance": 1.0}) for distiller in ("at", "crd")},
}


# ---- in a process that sees the GPU


def all_answers(folder):
    """What every question below is answered with, or the traceback of what went wrong."""
    import fakecuda

    answers = {}
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # a capture collects garbage first, which is slow with all that was imported
    for name, question in QUESTIONS.items():
        gc.collect()
        torch.cuda.empty_cache()  # which is nothing before the first question has been asked
        fakecuda.reset()
        try:
            answers[name] = question(f"{folder}/{name}")
        except BaseException:
            answers[name] = {"problem": traceback.format_exc()}
    return answers


def share_a_run(folder):
    """Of two processes, each of which sees both GPUs. What has used a GPU cannot be forked, so this comes first."""
    common = {"WORLD_SIZE": "2", "FAKECUDA_DEVICES": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    return in_forks(take_part, folder, environments=environments)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def take_part(folder):
    import fakecuda

    device = choose_device("auto")
    with process_group(device):
        keys = {"epochs": 1, "lr_decay_epochs": []}
        engine = trained(folder, "crd", graph="auto", device=device, shard=(device.index, 2), **keys)
    return fakecuda.stats() | {
        "device": str(device),
        "captured": is_captured(engine),
        "log": engine.run.log.read_text() if is_main() else "",
    }


def run_entry_points(folder):
    """A teacher, then students, by the commands of the README: ``training.device`` is auto."""
    import fakecuda

    found = {}
    for name, words in COMMANDS.items():
        fakecuda.reset()
        with redirect_stdout(StringIO()) as printed:
            status, errors = run_command(*words, f"run.root={folder}")
        found[name] = fakecuda.stats() | {"status": status, "errors": errors, "printed": printed.getvalue()}
    return found


def run_command(script, *words):
    """Exit code and standard error of an entry point."""
    sys.argv = [script, *words]
    with redirect_stderr(StringIO()) as errors:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as leaving:
            return leaving.code, errors.getvalue()


def train_on_an_old_gpu(folder):
    return in_forks(refuse_bf16, folder, environments=[{"FAKECUDA_CC": "7.5"}])[0]


def refuse_bf16(folder):
    """Exit code, standard error and output in each precision, and how commands refuse bf16."""
    from utils.benchmark.__main__ import main as benchmark
    from utils.evaluate import main as evaluate

    found = {}
    for precision in ("bf16", "tf32"):
        words = [*COMMANDS["resnet8"], f"run.root={folder}/{precision}", f"training.precision={precision}"]
        with redirect_stdout(StringIO()) as printed:
            found[precision] = (*run_command(*words, "training.epochs=1"), printed.getvalue())
    for command, *words in [
        (benchmark, "resnet8-resnet8", "at", "--precision", "bf16"),
        (evaluate, f"{folder}/tf32/digits/1029/resnet8", "training.precision=bf16"),
    ]:
        with pytest.raises(UserError) as refusal:
            command(words)
        found[words[0].rpartition("/")[2]] = str(refusal.value)
    return found


def run_out_of_memory(folder):
    """Where the images do not fit, and where a step does not."""
    found = {}
    for what, mebibytes in (("images", 2), ("step", 40)):
        words = [*COMMANDS["resnet8"], f"run.root={folder}/{what}", "training.batch_size=512"]
        with little_memory(mebibytes):
            status, errors = run_command(*words)
        found[what] = {"status": status, "errors": errors}
    return found


class OddNet(ToyNet):
    """Maps of 6x6 and 3x3, which do not divide those of `ToyNet`."""

    def __init__(self):
        super().__init__()
        self.conv2.padding = (0, 0)


def capture_every_distiller(folder):
    import fakecuda

    found = {}
    for (distiller, kind), (precision, sizes, options) in KINDS.items():
        fakecuda.reset()
        set_up(toy_config(deterministic=kind == "deterministic"))
        if kind == "deterministic" and distiller != "crd":
            options = {"teacher": OddNet}
        with mock.patch("distillers.spot_adaptive.balance.EVERY", 3):  # the first and the fourth step measure
            training = steps_on_gpu(distiller, precision, **options).take(sizes)
            seen = fakecuda.stats()
            training.take([8], waiting_refused)
        found[f"{distiller} {kind}"] = {
            "complaints": training.complaints,
            "ways": len(training.step._ways),
            "replays": seen["graph_launches"],
            "violations": seen["violations"],
            # PyTorch fills what it allocates for a graph's generator if it is told to be deterministic.
            "outside": [kernel for kernel in seen["outside"] if "FillFunctor<long>" not in kernel],
        }
    set_up(toy_config())
    return found


RECIPES = {"all at once": RECIPE} | {
    name: {"optimizer": {"name": name}}
    for name in get_args(Optimizer)
    if name not in ("SGD", "Adafactor")  # the others have the first, and the second has kernels that are compiled
}


def capture_every_recipe(folder):
    import fakecuda

    found = {}
    for name, recipe in RECIPES.items():
        fakecuda.reset()
        training = steps_on_gpu("kd", training=recipe).take([8, 8])
        seen = fakecuda.stats()
        found[name] = {"complaints": training.complaints, "replays": seen["graph_launches"]}
        found[name] |= {key: seen[key] for key in ("violations", "outside")}
    return found


def resume(folder):
    """Whole, cut off in the middle of an epoch and resumed, and without captures."""
    import fakecuda

    def seen(name, **options):
        fakecuda.reset()
        engine = trained(f"{folder}/{name}", "crd", save_every_steps=3, **options)
        random = read_checkpoint(engine.run.last)["processes"][0]["rng"]["cuda"].tolist()
        return fakecuda.stats() | {"captured": is_captured(engine), "random": random}

    cut = make_engine(f"{folder}/cut", "crd", save_every_steps=3)
    cut_power_after(cut, 3)  # the first is one step before the end of an epoch
    try:
        finish(cut)
    except PowerCut:
        torch.manual_seed(99)  # a new process has another random state
    return {"whole": seen("whole"), "cut": seen("cut", resume=True), "eager": seen("eager", graph=False)}


def change_phases(folder):
    import fakecuda

    engine = trained(f"{folder}/ft", "ft")
    phases = [record["phase"] for record in records(engine.run)]
    return fakecuda.stats() | {"phases": phases, "log": engine.run.log.read_text()}


def load_batches(folder):
    """Launches of one batch, for each loader, and runs that stream images."""
    import fakecuda

    found = {}
    for workers in (None, 0, 2):
        batches = toy_data(BATCH, device=choose_device("auto"), workers=workers).train.epoch(0)
        next(batches)  # with it, the whole epoch is planned
        fakecuda.reset()
        count = len(list(batches))
        found[f"loader {workers}"] = {name: fakecuda.stats()[name] / count for name in ("launches", "h2d", "d2h")}
    fakecuda.reset()
    engine = trained(f"{folder}/streamed", "at", workers=2)
    return found | {"streamed": fakecuda.stats() | {"captured": is_captured(engine)}}


class DrawsOnTheHost(AT):
    def spot_loss(self, k, student, teacher, gate, batch):
        return super().spot_loss(k, student, teacher, gate, batch) * random.random()


class WaitsInASmallCapture(WaitsOnlyInACapture):
    def spot_loss(self, k, student, teacher, gate, batch):
        if len(batch.label) == 5:
            return super().spot_loss(k, student, teacher, gate, batch)
        return AT.spot_loss(self, k, student, teacher, gate, batch)


def held_by_us(segment):
    """Sizes of what is in use in a segment of memory, workspaces of libraries left out; all of it if nothing is."""
    used = [block["size"] for block in segment["blocks"] if block["state"] != "inactive"]
    if not used and torch.__version__.startswith("2.11."):  # it keeps a free segment of the pool
        return []
    return [size for size in used if size not in WORKSPACES] if used else [segment["total_size"]]


def give_up(folder):
    import fakecuda

    found = {}
    eager = steps_on_gpu(captured=False).take([8, 8, 8])
    allocated = torch.cuda.memory_allocated()
    del eager
    differs = mock.patch("utils.training.snapshot.Snapshot.distances", return_value={("", "the weights"): float("nan")})
    cases = [
        ("breaks", WaitsOnlyInACapture, nullcontext()),
        ("draws", DrawsOnTheHost, nullcontext()),
        ("differs", "at", differs),
    ]
    for name, distiller, context in cases:
        fakecuda.reset()
        gc.collect()
        gc.disable()  # what is freed is not left to it
        try:
            with context:
                training = steps_on_gpu(distiller).take([8, 8, 8, 5])
        finally:
            gc.enable()
        found[name] = {
            "complaints": training.complaints,
            "captured": training.step.captured,
            "more memory": torch.cuda.memory_allocated() - allocated,
            "pools": [
                size
                for segment in torch.cuda.memory_snapshot()
                if tuple(segment["segment_pool_id"]) != (0, 0)
                for size in held_by_us(segment)
            ],
        }
        del training
    fakecuda.reset()
    training = steps_on_gpu(WaitsInASmallCapture).take([8, 8, 5, 8, 5, 11, 11])
    found["later"] = fakecuda.stats() | {"complaints": training.complaints, "captured": training.step.captured}
    recorders = [CudaRecorder(choose_device("auto")) for _ in range(2)]
    for recorder in recorders:
        recorder.run(lambda: None)
    return found | {"one stream": recorders[0]._stream is recorders[1]._stream}


def reserve_memory(folder):
    """MiB that PyTorch reserves for steps with a smaller last batch, eager and captured."""
    import fakecuda

    from utils.benchmark.cases import Case, Conditions, Kind, Pair

    found = {}
    for graph in ("false", "true"):
        gc.collect()
        torch.cuda.empty_cache()
        fakecuda.reset()
        before = fakecuda.stats()["bytes"][0]
        conditions = Conditions(choose_device("auto"), cuda_graph=graph, samples=100, batch_size=96)
        case = Case(Pair("wrn_40_2", "wrn_16_2"), Kind("at", "adaptive"), conditions)
        last = replace(conditions, batch_size=48).batch()
        for batch in (case.batch, case.batch, last, case.batch, last):
            case._step(batch)
        found[graph] = (fakecuda.stats()["peak"][0] - before) / 2**20
        del case
    return found


def measure(folder):
    # Not before: PyTorch's own asks for the GPU when it is imported, and then no process can be forked.
    from utils.benchmark.__main__ import main as benchmark

    file = Path(folder).with_suffix(".json")
    torch.backends.cudnn.benchmark = False
    words = ["resnet8-resnet8", "at", "--batch-size", "4", "--size", "16", "--samples", "60", "--rounds", "1"]
    with redirect_stdout(StringIO()) as text:
        benchmark([*words, "--json", str(file)])
    return {"text": text.getvalue(), "cudnn": torch.backends.cudnn.benchmark} | json.loads(file.read_text())


QUESTIONS = {
    "two processes": share_a_run,
    "an old GPU": train_on_an_old_gpu,
    "entry points": run_entry_points,
    "distillers": capture_every_distiller,
    "recipes": capture_every_recipe,
    "resuming": resume,
    "phases": change_phases,
    "batches": load_batches,
    "giving up": give_up,
    "memory": reserve_memory,
    "benchmark": measure,
    "out of memory": run_out_of_memory,
}


def run_gpu_tests():
    """The tests for a real GPU, without looking at values."""
    import test_gpu

    accept = mock.Mock(return_value=True)
    torch.testing.assert_close = torch.equal = test_gpu.assert_close = test_gpu.assert_equal = accept
    about_values = "tests/training/test_gpu.py::TestCapturedRuns::test_follow_a_learning_rate_that_drops"
    words = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*words, "--deselect", about_values, test_gpu.__file__]))


# ---- what it says


@pytest.fixture
def answer(stand_in, once, tmp_path_factory):
    """Of the question called so."""

    def ask():
        folder = str(tmp_path_factory.mktemp("stand-in"))
        return folder, stand_in.call(all_answers, folder)

    folder, answers = once("stand-in", ask)

    def find(name):
        found = answers[name]
        assert "problem" not in found, found["problem"]
        return found

    find.folder = Path(folder)
    return find


def follows_the_rules(found):
    """No capture was broken, and none was left while it was under way."""
    return (found["violations"], found["outside"]) == ([], {})


class TestEntryPoints:
    @pytest.mark.parametrize("name", COMMANDS)
    def test_train_on_the_gpu_with_captured_steps_between_evaluations(self, answer, name):
        found, run = answer("entry points")[name], RunDir(answer.folder / "entry points/digits/1029" / name)
        assert found["status"] == 0, found["errors"]
        assert run.result.exists()
        assert len(records(run)) == 2
        assert "eagerly" not in run.log.read_text()
        assert found["printed"].count("training.precision=tf32") == 1
        assert found["graph_launches"] == DIGITS_STEPS - 1
        assert follows_the_rules(found)

    @pytest.mark.parametrize("what", ["images", "step"])
    def test_say_what_to_do_when_memory_is_exhausted(self, answer, what):
        found = answer("out of memory")[what]
        assert found["status"] == 2
        assert found["errors"].startswith("error: cuda:0: out of memory (tried to allocate ")
        assert found["errors"].endswith("training.cuda_graph=false\n")
        assert found["errors"].count("\n") == 1

    def test_on_a_gpu_of_before_8_0_refuse_bf16_and_say_that_tf32_is_fp32(self, answer):
        found = answer("an old GPU")
        assert isinstance(found, dict), found
        code, errors, _ = found["bf16"]
        assert (code, errors.count("\n")) == (2, 1)
        assert "training.precision: bf16 needs compute capability 8.0" in errors
        code, errors, printed = found["tf32"]
        assert (code, errors) == (0, "")
        assert "training.precision=tf32 is fp32 here" in printed
        assert found["resnet8-resnet8"].startswith("--precision: bf16 needs compute capability 8.0, and ")
        assert found["resnet8"].startswith("training.precision: bf16 needs compute capability 8.0, and ")


@pytest.mark.parametrize(("distiller", "kind"), KINDS)
def test_every_distiller_is_captured(answer, distiller, kind):
    found = answer("distillers")[f"{distiller} {kind}"]
    ways = 2 if kind in ("sizes", "balanced") else 1  # two sizes, or one with a measurement and without
    replays = len(KINDS[distiller, kind][1]) - 1  # the first step is eager
    assert found == {"complaints": [], "ways": ways, "replays": replays, "violations": [], "outside": []}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_captured_or_says_why_not(answer, name):
    found = answer("recipes")[name]
    if name == "Adagrad":
        ((_, complaint),) = found["complaints"]
        assert complaint.startswith("Adagrad takes its learning rate from the host")
    else:
        assert found == {"complaints": [], "replays": 1, "violations": [], "outside": {}}


class TestRuns:
    def test_are_captured_again_when_resumed_and_draw_the_same_numbers(self, answer):
        found = answer("resuming")
        launches = {"whole": 3 * 4 - 1, "cut": 3 * 4 - 7 - 1, "eager": 0}  # cut off within an epoch, after 7 steps
        assert {name: found[name]["graph_launches"] for name in launches} == launches
        assert [found[name]["captured"] for name in launches] == [True, True, False]
        assert found["whole"]["random"] == found["cut"]["random"] == found["eager"]["random"]
        assert all(map(follows_the_rules, found.values()))

    def test_are_captured_in_each_of_their_phases(self, answer):
        found = answer("phases")
        assert found["phases"] == ["pretrain"] * 2 + ["train"] * 3
        assert found["graph_launches"] == 5 * 4 - 2  # of each phase, the first step is eager
        assert "eagerly" not in found["log"]
        assert follows_the_rules(found)

    def test_are_captured_when_images_are_streamed(self, answer):
        found = answer("batches")["streamed"]
        assert found["captured"]
        assert found["graph_launches"] == 3 * 4 - 1
        assert follows_the_rules(found)

    def test_of_two_processes_are_eager_and_talk_in_one_order(self, answer):
        first, second = answer("two processes")
        assert isinstance(first, dict), first
        assert isinstance(second, dict), second
        assert [first["device"], second["device"]] == ["cuda:0", "cuda:1"]
        assert not first["captured"]
        assert "steps run eagerly, not as one CUDA graph: there are 2 processes" in first["log"]
        assert first["nccl"] == second["nccl"]
        steps, passes = 4, 2
        assert sum("allreduce 761 float32" in call for call in first["nccl"]) == steps  # the student's gradients
        assert len(first["nccl"]) > steps * passes
        assert follows_the_rules(first)


@pytest.mark.parametrize(("workers", "launches", "sent"), [(None, 5, 0), (0, 9, 1), (2, 9, 1)])
def test_batches_are_made_by_few_kernels_and_streamed_ones_are_sent_and_padded_besides(answer, workers, launches, sent):
    assert answer("batches")[f"loader {workers}"] == {"launches": launches, "h2d": sent, "d2h": 0}


BROKEN = "CUDA error: operation not permitted when stream is capturing"
DRAWS = "it draws from Python's random, and a captured step would draw the same numbers again and again"


class TestGivingUp:
    @pytest.mark.parametrize(
        ("name", "complaint"),
        [("breaks", BROKEN), ("draws", DRAWS), ("differs", "a repetition leaves other values in the weights")],
    )
    def test_is_one_line_and_frees_all_memory(self, answer, name, complaint):
        found = answer("giving up")[name]
        assert found["complaints"] == [[None, complaint]]
        assert not found["captured"]
        assert found["pools"] == []
        assert found["more memory"] in (0, WORKSPACES[0], sum(WORKSPACES))

    def test_at_a_later_shape_keeps_what_is_captured_and_goes_on_capturing(self, answer):
        found = answer("giving up")["later"]
        assert found["complaints"] == [[5, BROKEN]]
        assert found["captured"]
        # A proof and a repetition of 8, the same of 11. The broken capture is the only violation.
        assert found["graph_launches"] == 4
        assert len(found["violations"]) == 1

    def test_and_trying_again_takes_no_further_stream(self, answer):
        assert answer("giving up")["one stream"]


def test_captured_steps_reserve_about_as_much_memory_as_eager_ones(answer):
    found = answer("memory")  # nearly twice as much, when each capture had memory of its own
    assert found["true"] < 1.15 * found["false"]


def test_the_benchmark_measures_captured_steps_as_runs_take_them_and_their_memory(answer):
    found = answer("benchmark")
    assert found["cudnn"]  # .benchmark, as in runs
    assert len(found["results"]) == found["text"].count("| captured ") == 3
    for result in found["results"]:
        assert result["captured"]
        # A replay alone allocates nothing: weights, momentum and activations count, graphs of other cases do not.
        assert 2**20 < result["bytes"] < 64 * 2**20


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_run(stand_in):
    assert stand_in.call(run_gpu_tests) == 0
