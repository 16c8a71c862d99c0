"""What only a GPU can show: real CUDA graphs, their random numbers, waiting for the device, fused optimisers.

Where two runs are compared they launch the same kernels in the same order, but atomic additions (in the gradient of
CRD's gather, say) may round differently, hence the tolerance. All runs are small enough for a few seconds. Results
are compared with those of a CPU where both draw the same random numbers.
"""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from gpu_runs import (
    BATCH,
    DEVICE,
    WaitsOnlyInACapture,
    is_captured,
    make_engine,
    steps_on_gpu,
    trained,
)
from process_runs import config_file, prepare
from stand_in import REPOSITORY
from toy_runs import assert_equal, break_off, records, toy_config
from toys import toy_data

from distillers import DISTILLERS
from utils.config import load_config
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.cuda_graph import waiting_refused
from utils.training.device import set_up
from utils.training.precision import has_tensor_cores
from utils.training.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m gpu"),
]

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


@pytest.fixture(autouse=True)
def _backends_as_before():
    """`make_engine` changes them for the whole process."""
    yield
    set_up(toy_config())
    torch.backends.cudnn.deterministic = False


def assert_close(found, expected, tolerance=CLOSE):
    """Compare the outcomes of two runs: weights, banks, policy, momentum, figures."""
    found_state, expected_state = (read_checkpoint(engine.run.last) for engine in (found, expected))
    for key in ("model", "extra", "gates"):
        torch.testing.assert_close(found_state[key], expected_state[key], **tolerance)
    for name, state in expected_state["optimizers"].items():
        for place, values in state["state"].items():
            own = found_state["optimizers"][name]["state"][place]
            torch.testing.assert_close(own["momentum_buffer"], values["momentum_buffer"], **tolerance)
    for line, other in zip(records(found.run), records(expected.run), strict=True):
        for part in ("train", "val"):
            for name, value in other.get(part, {}).items():
                # One of 40 images whose two best logits are nearly the same counts 2.5 %: two may fall the other way.
                least = 5.0 if name in ("top1", "class_mean") else tolerance["atol"]
                assert line[part][name] == pytest.approx(value, rel=tolerance["rtol"], abs=least), name


class TestCapturedRuns:
    """Three epochs with learning rates that drop, a smaller batch at the end of each, and evaluations in between."""

    @pytest.mark.parametrize(
        ("distiller", "keys", "tolerance"),
        [
            ("at", {}, CLOSE),
            ("crd", {"selection": "anti"}, CLOSE),
            ("sp", {"selection": "random"}, CLOSE),
            ("fsp", {"selection": "fixed"}, CLOSE),
            (None, {}, CLOSE),
            ("at", {"precision": "tf32"}, {"rtol": 0.01, "atol": 0.01}),
            ("at", {"precision": "bf16", "selection": "fixed"}, {"rtol": 0.05, "atol": 0.05}),
        ],
    )
    def test_end_like_eager_ones_and_draw_the_same_random_numbers(self, tmp_path, distiller, keys, tolerance):
        captured = trained(tmp_path / "captured", distiller, **keys)
        eager = trained(tmp_path / "eager", distiller, graph=False, **keys)
        assert is_captured(captured)
        assert not is_captured(eager)
        assert_close(captured, eager, tolerance)
        found, expected = (read_checkpoint(engine.run.last)["processes"][0]["rng"] for engine in (captured, eager))
        assert_equal(found, expected)

    @pytest.mark.parametrize("distiller", ["at", "crd", "nst"])
    def test_are_repeated_bit_by_bit_if_they_are_to_be_deterministic(self, tmp_path, distiller):
        runs = [trained(tmp_path / str(k), distiller, deterministic=True) for k in range(2)]
        assert all(map(is_captured, runs))
        states = [read_checkpoint(engine.run.last) for engine in runs]
        for key in ("model", "extra", "optimizers", "gates"):
            assert_equal(states[0][key], states[1][key], key)

    @pytest.mark.parametrize(("distiller", "saves"), [("at", 1), ("crd", 2), ("fsp", 2)])
    def test_are_resumed_as_if_never_interrupted(self, tmp_path, distiller, saves):
        whole = trained(tmp_path / "whole", distiller, save_every_steps=3)
        cut = make_engine(tmp_path / "cut", distiller, save_every_steps=3)
        break_off(cut, saves)
        resumed = trained(tmp_path / "cut", distiller, save_every_steps=3, resume=True)
        assert is_captured(resumed)
        assert_close(resumed, whole)
        random = [read_checkpoint(engine.run.last)["processes"][0]["rng"]["cuda"] for engine in (resumed, whole)]
        assert torch.equal(*random)

    @pytest.mark.parametrize("workers", [0, 2])
    def test_take_streamed_images(self, tmp_path, workers):
        streamed = trained(tmp_path / "streamed", workers=workers)
        assert is_captured(streamed)
        assert_close(streamed, trained(tmp_path / "memory"))

    @pytest.mark.parametrize("precision", ["fp32", "bf16"])  # of which the second has another memory layout
    def test_start_from_a_config_and_go_on_elsewhere(self, tmp_path, precision):
        """From a CPU, where maps lie in memory differently, to a GPU and back."""
        if precision == "bf16" and not has_tensor_cores(DEVICE):
            pytest.skip("this GPU has no bf16")
        prepare(tmp_path)
        for epochs, device in enumerate(("cpu", "cuda", "cpu"), 1):
            keys = {"device": device, "precision": precision, "epochs": epochs, "lr_decay_epochs": [1]}
            config = load_config(config_file(tmp_path, "crd", training=keys))
            train(config, resume=epochs > 1)
        assert len(records(RunDir(config.run_dir))) == 3
        assert "eagerly" not in RunDir(config.run_dir).log.read_text()


def test_what_breaks_a_capture_off_runs_eagerly_and_says_so_once(tmp_path):
    refused = trained(tmp_path / "refused", WaitsOnlyInACapture, graph="auto")
    eager = trained(tmp_path / "eager", WaitsOnlyInACapture, graph=False)
    assert not is_captured(refused)
    assert refused.run.log.read_text().count("steps of train run eagerly, not as one CUDA graph: ") == 1
    assert_close(refused, eager)


BALANCED = {"balance": 0.01, "beta": 100.0}


@pytest.mark.parametrize(
    ("distiller", "options"), [*((name, {}) for name in sorted(set(DISTILLERS))), ("at", BALANCED), ("crd", BALANCED)]
)
def test_steps_leave_the_same_when_captured(distiller, options):
    """Batches of the usual size, and smaller and larger ones."""
    set_up(toy_config())
    states = []
    for captured in (True, False):
        training = steps_on_gpu(distiller, captured=captured, **options).take([8, 8, 5, 8, 5, 11, 8, 11])
        training.take([8], waiting_refused)
        assert training.step.captured == captured
        assert training.complaints == []
        states.append(training.task.state_dict())
    torch.testing.assert_close(*states, **CLOSE)


@pytest.mark.parametrize("distiller", sorted(set(DISTILLERS)))
def test_a_step_computes_what_a_cpu_does(distiller, monkeypatch):
    set_up(toy_config())
    draw_on_the_host(monkeypatch)
    states = []
    for device in (CPU, DEVICE):
        training = steps_on_gpu(distiller, captured=False, device=device).take([8])
        values = training.task.state_dict() | {name: torch.tensor(x) for name, x in training.meter.means().items()}
        states.append({name: value.cpu() for name, value in values.items()})
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-3)


def draw_on_the_host(monkeypatch):
    """Let gates and negatives be the same on every device."""
    exponential, rand = torch.Tensor.exponential_, torch.rand

    def exponential_from_the_host(tensor):
        return tensor.copy_(exponential(torch.empty(tensor.shape, dtype=tensor.dtype)))

    def rand_from_the_host(*size, device=None, **options):
        return rand(*size, **options).to(device)

    monkeypatch.setattr(torch.Tensor, "exponential_", exponential_from_the_host)
    monkeypatch.setattr(torch, "rand", rand_from_the_host)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and -m gpu")
def test_two_gpus_train_like_two_processes_on_the_cpu(tmp_path):
    prepare(tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        keys = {"device": device, "epochs": 1, "lr_decay_epochs": []}
        config = config_file(tmp_path, "at", "fixed", training=keys, run={"root": str(tmp_path / device)})
        command = [sys.executable, "-m", "utils.launch", "2", "train.py", "--config", str(config)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        found.append(records(RunDir(load_config(config).run_dir)))
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu["train"] == pytest.approx(on_cpu["train"], rel=0.01, abs=0.01)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_every_loader_yields_the_batches_of_a_cpu(workers):
    on_cpu = toy_data(BATCH).train
    on_gpu = toy_data(BATCH, device=DEVICE, workers=workers).train
    for epoch in range(2):
        for batch, expected in zip(on_gpu.epoch(epoch), on_cpu.epoch(epoch), strict=True):
            for found, wanted in zip(batch, expected, strict=True):
                assert found.device.type == "cuda"
                assert torch.equal(found.cpu(), wanted)
