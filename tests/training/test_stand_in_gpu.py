"""Training on a stand-in for a GPU, where PyTorch's CUDA backend is real and the values are not.

The checks run one after another in a process that sees the GPU, see `stand_in.call_there`. Each is a test, which
fails with the traceback from there.
"""

from __future__ import annotations

import gc
import importlib
import json
import runpy
import sys
import traceback
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from pathlib import Path
from typing import get_args
from unittest import mock

import fakecuda
import pytest
import torch
from gpu_runs import BATCH, WaitsOnlyInACapture, is_captured, little_memory, make_engine, steps_on_gpu, trained
from process_pair import places_of_two
from stand_in import in_forks
from toy_runs import RECIPE, break_off, records, toy_config
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

CHECKS = {}  # by name, in order; they are called with a folder
IMPORTED = ("torch._dynamo", "torch.distributed.nn.functional")  # shared by forks
WORKSPACES = (32 * 2**20, 2**20)  # bytes that cuBLAS keeps for a stream, and in PyTorch 2.11 cuBLASLt
DIGITS = ["--dataset", "digits", "training.epochs=2", "training.batch_size=64", "validation.batch_size=60"]
DIGITS_STEPS = 26  # of two epochs; the last one of each is smaller
BROKEN = "CUDA error: operation not permitted when stream is capturing"


def check(function):
    CHECKS[function.__name__] = function
    return function


def equal(found, expected):
    assert found == expected, f"found {found!r}, expected {expected!r}"


def equal_launches(expected):
    """Of graphs. No capture was broken, and no kernel was launched outside of one while it was under way."""
    found = fakecuda.stats()
    equal([found[key] for key in ("graph_launches", "violations", "outside")], [expected, [], {}])


def run_command(script, *words):
    """Exit code, standard output and standard error of an entry point."""
    sys.argv = [script, *words]
    with redirect_stdout(StringIO()) as printed, redirect_stderr(StringIO()) as errors:
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as leaving:
            return leaving.code, printed.getvalue(), errors.getvalue()


def train_alone(folder, *words):
    return run_command("train_single.py", "--model", "resnet8", *DIGITS, f"run.root={folder}", *words)


# ---- in forks, so before this process asks for a GPU


def take_part(folder):
    device = choose_device("auto")
    with process_group(device):
        keys = {"epochs": 1, "lr_decay_epochs": []}
        engine = trained(folder, "crd", graph="auto", device=device, shard=(device.index, 2), **keys)
    assert not is_captured(engine)
    equal_launches(0)
    if is_main():
        assert "steps run eagerly, not as one CUDA graph: there are 2 processes" in engine.run.log.read_text()
    return str(device), fakecuda.stats()["nccl"]


@check
def two_processes_that_see_both_gpus_train_eagerly_and_talk_in_one_order(folder):
    environments = [place | {"FAKECUDA_DEVICES": "2"} for place in places_of_two()]
    (first, calls), (second, others) = in_forks(take_part, folder, environments=environments)
    equal((first, second, others), ("cuda:0", "cuda:1", calls))
    steps, passes = 4, 2
    equal(sum("allreduce 761 float32" in call for call in calls), steps)  # the student's gradients
    assert len(calls) > steps * passes


def use_an_old_gpu(folder):
    from utils.benchmark.__main__ import main as benchmark
    from utils.evaluate import main as evaluate

    code, _, errors = train_alone(f"{folder}/bf16", "training.precision=bf16")
    equal((code, errors.count("\n")), (2, 1))
    assert "training.precision: bf16 needs compute capability 8.0" in errors, errors
    code, printed, errors = train_alone(f"{folder}/tf32", "training.precision=tf32", "training.epochs=1")
    equal((code, errors), (0, ""))
    assert "training.precision=tf32 is fp32 here" in printed, printed
    for option, command, *words in [
        ("--precision", benchmark, "resnet8-resnet8", "at", "--precision", "bf16"),
        ("training.precision", evaluate, f"{folder}/tf32/digits/1029/resnet8", "training.precision=bf16"),
    ]:
        with pytest.raises(UserError, match=f"^{option}: bf16 needs compute capability 8.0, and "):
            command(words)


@check
def a_gpu_of_before_8_0_refuses_bf16_and_says_that_tf32_is_fp32(folder):
    in_forks(use_an_old_gpu, folder, environments=[{"FAKECUDA_CC": "7.5"}])


# ---- commands


@check
def entry_points_take_the_gpu_and_capture_their_steps_between_evaluations(folder):
    pair = ["train.py", "--net1", "resnet8", "--net2", "resnet8", "--distiller", "at"]
    for run, train in [
        ("resnet8", train_alone),
        ("adaptive-at/resnet8-resnet8", lambda folder: run_command(*pair, *DIGITS, f"run.root={folder}")),
    ]:
        fakecuda.reset()
        code, printed, errors = train(folder)
        equal((code, errors), (0, ""))
        run = RunDir(Path(folder, "digits/1029", run))
        assert run.result.exists()
        equal(len(records(run)), 2)
        assert "eagerly" not in run.log.read_text()
        equal(printed.count("training.precision=tf32"), 1)
        equal_launches(DIGITS_STEPS - 1)


@check
def exhausted_memory_is_one_line_with_advice(folder):
    for what, mebibytes in (("images", 2), ("step", 40)):
        with little_memory(mebibytes):
            code, _, errors = train_alone(f"{folder}/{what}", "training.batch_size=512")
        equal((code, errors.count("\n")), (2, 1))
        assert errors.startswith("error: cuda:0: out of memory (tried to allocate "), errors
        assert errors.endswith("training.cuda_graph=false\n"), errors


@check
def the_benchmark_measures_captured_steps_as_runs_take_them_and_their_memory(folder):
    # Not before: PyTorch's own asks for the GPU when it is imported, and then no process can be forked.
    from utils.benchmark.__main__ import main as benchmark

    file = Path(folder).with_suffix(".json")
    torch.backends.cudnn.benchmark = False
    words = ["resnet8-resnet8", "at", "--batch-size", "4", "--size", "16", "--samples", "60", "--rounds", "1"]
    with redirect_stdout(StringIO()) as text:
        benchmark([*words, "--json", str(file)])
    assert torch.backends.cudnn.benchmark  # as in runs
    results = json.loads(file.read_text())["results"]
    equal([len(results), text.getvalue().count("| captured ")], [3, 3])
    for result in results:
        # A replay alone allocates nothing: weights, momentum and activations count, graphs of other cases do not.
        assert result["captured"] and 2**20 < result["bytes"] < 64 * 2**20, result  # noqa: PT018


# ---- what is captured


class OddNet(ToyNet):
    """Maps of 6x6 and 3x3, which do not divide those of `ToyNet`."""

    def __init__(self):
        super().__init__()
        self.conv2.padding = (0, 0)


def capture(folder, distiller, sizes=(8, 8), ways=1, precision="fp32", deterministic=False, **options):
    set_up(toy_config(deterministic=deterministic))
    try:
        training = steps_on_gpu(distiller, precision, **options).take(sizes)
        seen = fakecuda.stats()
        training.take([8], waiting_refused)
    finally:
        set_up(toy_config())
    equal((training.complaints, len(training.step._by_shapes)), ([], ways))
    equal((seen["graph_launches"], seen["violations"]), (len(sizes) - 1, []))  # the first step is eager
    # PyTorch fills what it allocates for a graph's generator if it is told to be deterministic.
    equal([kernel for kernel in seen["outside"] if "FillFunctor<long>" not in kernel], [])


for _name in sorted(set(DISTILLERS)):
    _teacher = {} if _name == "crd" else {"teacher": OddNet}
    CHECKS[f"{_name}_is_captured"] = partial(capture, distiller=_name, precision="bf16", deterministic=True, **_teacher)
for _name in sorted(SELECTIONS):
    CHECKS[f"at_{_name}_is_captured"] = partial(capture, distiller="at", selection=_name)
for _name in ("at", "crd"):
    CHECKS[f"balanced_{_name}_is_captured"] = partial(capture, distiller=_name, balance=1.0)
CHECKS["batches_of_two_sizes_are_captured"] = partial(capture, distiller="crd", sizes=[8, 8, 5, 8, 5], ways=2)


def follow_recipe(folder, recipe):
    training = steps_on_gpu("kd", training=recipe).take([8, 8])
    if recipe["optimizer"]["name"] == "Adagrad":
        ((_, complaint),) = training.complaints
        assert complaint.startswith("Adagrad takes its learning rate from the host"), complaint
    else:
        equal(training.complaints, [])
        equal_launches(1)


CHECKS["a_step_with_all_that_is_off_by_default_is_captured"] = partial(follow_recipe, recipe=RECIPE)
for _name in sorted({*get_args(Optimizer)} - {"SGD", "Adafactor"}):  # the last one has kernels that are compiled
    CHECKS[f"{_name}_is_captured_or_says_why_not"] = partial(follow_recipe, recipe={"optimizer": {"name": _name}})


@check
def a_resumed_run_is_captured_again_and_draws_the_same_numbers(folder):
    """Whole, cut off in the middle of an epoch after 7 steps and resumed, and without captures."""
    cut = make_engine(f"{folder}/cut", "crd", save_every_steps=3)
    break_off(cut, 3)  # the first is one step before the end of an epoch
    drawn = []
    for name, options, launches in [
        ("whole", {}, 3 * 4 - 1),
        ("cut", {"resume": True}, 3 * 4 - 7 - 1),
        ("eager", {"graph": False}, 0),
    ]:
        fakecuda.reset()
        engine = trained(f"{folder}/{name}", "crd", save_every_steps=3, **options)
        equal(is_captured(engine), name != "eager")
        equal_launches(launches)
        drawn.append(read_checkpoint(engine.run.last)["processes"][0]["rng"]["cuda"].tolist())
    equal(drawn[1:], drawn[:1] * 2)


@check
def each_phase_is_captured(folder):
    engine = trained(folder, "ft")
    equal([record["phase"] for record in records(engine.run)], ["pretrain"] * 2 + ["train"] * 3)
    assert "eagerly" not in engine.run.log.read_text()
    equal_launches(5 * 4 - 2)  # of each phase, the first step is eager


@check
def steps_on_streamed_images_are_captured(folder):
    assert is_captured(trained(folder, "at", workers=2))
    equal_launches(3 * 4 - 1)


@check
def batches_are_made_by_few_kernels_and_streamed_ones_are_sent_and_padded_besides(folder):
    for workers, launches, sent in [(None, 5, 0), (0, 9, 1), (2, 9, 1)]:
        batches = toy_data(BATCH, device=choose_device("auto"), workers=workers).train.epoch(0)
        next(batches)  # with it, the whole epoch is planned
        fakecuda.reset()
        count, found = len(list(batches)), fakecuda.stats()
        equal([found[name] / count for name in ("launches", "h2d", "d2h")], [launches, sent, 0])


@check
def no_more_than_three_streamed_batches_are_ahead_of_the_device(folder):
    waited, usual = [], torch.cuda.Event.synchronize
    torch.cuda.Event.synchronize = lambda event: (waited.append(event), usual(event))
    try:
        count = len(list(toy_data(BATCH, device=choose_device("auto"), workers=0).train.epoch(0)))
    finally:
        torch.cuda.Event.synchronize = usual
    equal(len(waited), count - 3)
    assert waited


@check
def captured_steps_reserve_about_as_much_memory_as_eager_ones(folder):
    """With a smaller last batch. It was nearly twice as much, when each capture had memory of its own."""
    from utils.benchmark.cases import Case, Conditions, Kind, Pair

    taken = {}
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
        taken[graph] = fakecuda.stats()["peak"][0] - before
        del case
    assert taken["true"] < 1.15 * taken["false"], taken


# ---- giving up


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


@check
def giving_up_is_one_line_and_frees_all_memory(folder):
    eager = steps_on_gpu(captured=False).take([8, 8, 8])
    allocated = torch.cuda.memory_allocated()
    del eager
    differs = mock.patch("utils.training.snapshot.Snapshot.distances", return_value={"the weights": float("nan")})
    for distiller, context, complaint in [
        (WaitsOnlyInACapture, nullcontext(), BROKEN),
        ("at", differs, "a repetition leaves other values in the weights"),
    ]:
        gc.collect()
        gc.disable()  # what is freed is not left to it
        try:
            with context:
                training = steps_on_gpu(distiller).take([8, 8, 8, 5])
        finally:
            gc.enable()
        equal((training.complaints, training.step.captured), ([(None, complaint)], False))
        pools = [seen for seen in torch.cuda.memory_snapshot() if tuple(seen["segment_pool_id"]) != (0, 0)]
        equal([size for segment in pools for size in held_by_us(segment)], [])
        assert torch.cuda.memory_allocated() - allocated in (0, WORKSPACES[0], sum(WORKSPACES))
        del training


@check
def giving_up_at_a_later_size_keeps_what_is_captured_and_goes_on_capturing(folder):
    training = steps_on_gpu(WaitsInASmallCapture).take([8, 8, 5, 8, 5, 11, 11])
    equal((training.complaints, training.step.captured), ([(5, BROKEN)], True))
    # A proof and a repetition of 8, the same of 11. The broken capture is the only violation.
    found = fakecuda.stats()
    equal((found["graph_launches"], len(found["violations"])), (4, 1))


@check
def capturing_anew_takes_no_further_stream(folder):
    recorders = [CudaRecorder(choose_device("auto")) for _ in range(2)]
    for recorder in recorders:
        recorder.run(lambda: None)
    assert recorders[0]._stream is recorders[1]._stream


# ---- outside


def run_checks(folder):
    """The traceback of each that fails."""
    problems = {}
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # a capture collects garbage first, which is slow with all that was imported
    for name, function in CHECKS.items():
        gc.collect()
        torch.cuda.empty_cache()  # which is nothing before the first one has asked for the GPU
        fakecuda.reset()
        try:
            function(f"{folder}/{name}")
        except BaseException:
            problems[name] = traceback.format_exc()
    return problems


@pytest.mark.parametrize("name", CHECKS)
def test_on_the_stand_in(stand_in, once, tmp_path_factory, name):
    problems = once("stand-in", lambda: stand_in(run_checks, str(tmp_path_factory.mktemp("stand-in"))))
    assert name not in problems, problems[name]


def run_gpu_tests():
    """The tests for a real GPU, without looking at values."""
    import test_gpu

    accept = mock.Mock(return_value=True)
    torch.testing.assert_close = torch.equal = test_gpu.assert_close = test_gpu.assert_equal = accept
    words = ["-q", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*words, test_gpu.__file__]))


@pytest.mark.slow
def test_the_tests_for_a_gpu_can_be_run(stand_in):
    assert stand_in(run_gpu_tests) == 0
