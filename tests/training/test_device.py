"""Which device is chosen, what is said about it, and that freed memory is kept for the next step."""

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ready_process import ReadyProcess
from toys import ToyNet

from models import get_model
from utils.errors import UserError
from utils.files import warn_once
from utils.processes.rank import SHARED_THREADS
from utils.training.build import val_batch_size
from utils.training.device import choose_device, explaining_limits, keep_freed_memory, keep_threads
from utils.training.facts import flops_without_computing
from utils.training.precision import autocast, keep_in_bfloat16, precision_advice, refuse_precision, set_precision

CPU = torch.device("cpu")


def count_new_pages(variables):
    """Whether memory is kept, and pages that the system had to find for a tensor as large as those freed before."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    os.environ.update(variables)
    kept = keep_freed_memory(CPU)
    pages = []
    for _ in range(20):  # in a forked process it takes up to six to fill the gaps in the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, more than glibc would keep
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(kept, min(pages) < 1000)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize("variables", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}])
def test_a_tensor_takes_the_place_of_the_one_before_unless_the_environment_says_otherwise(variables):
    process = ReadyProcess(count_new_pages, variables)  # its own, for what is kept cannot be given up
    assert process.ending() == (0, "")
    assert process.stdout.read() == ("False False\n" if variables else "True True\n")


def show_fp32_precision():
    """Of convolutions and matrix products, by the new flags and the old ones."""
    torch.backends.fp32_precision = "tf32"
    for precision in ("fp32", "tf32"):
        set_precision(precision)
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        print(cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.allow_tf32, matmul.allow_tf32)


class TestAGpuThatCannotBeUsed:
    @pytest.fixture
    def broken(self, monkeypatch, tmp_path):
        """The system has a GPU; `torch.cuda.init` raises what is given."""
        (tmp_path / "nvidia3").touch()
        warn_once.cache_clear()

        def break_with(error, *, seen=False):
            def init():
                raise error

            monkeypatch.setattr("utils.training.device.GPU_FILES", tmp_path / "nvidia[0-9]*")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: seen)
            monkeypatch.setattr(torch.cuda, "init", init)
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

        return break_with

    @pytest.mark.parametrize(
        ("error", "seen", "advice"),
        [
            (RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)."), False, True),
            (AssertionError("Torch not compiled with CUDA enabled"), False, False),
            (RuntimeError("CUDA error: no kernel image is available for execution on the device"), True, True),
        ],
        ids=["driver", "wheel", "kernels"],
    )
    def test_is_one_warning_line_and_not_silently_the_cpu(self, broken, caplog, error, seen, advice):
        broken(error, seen=seen)
        assert [choose_device("auto") for _ in range(2)] == [CPU] * 2
        cause = " ".join(str(error).split())
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"auto takes the CPU, since PyTorch cannot use the GPU of this machine: {cause}" in line
        assert ("whl/cu126" in line) == advice
        refusal = r"training.device: PyTorch cannot use cuda:0: [^\n]*; auto takes"
        with pytest.raises(UserError, match=refusal) as caught:
            choose_device("cuda:0")
        assert cause in str(caught.value)

    def test_that_several_processes_ask_for_is_not_there(self, broken, monkeypatch):
        broken(RuntimeError("No CUDA GPUs are available"))
        for key, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(key, str(value))
        with pytest.raises(UserError, match="PyTorch cannot use cuda: No CUDA GPUs are available; auto takes"):
            choose_device("cuda")

    def test_is_no_matter_where_it_is_hidden_or_not_there(self, broken, caplog, monkeypatch):
        broken(RuntimeError("No CUDA GPUs are available"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_device("auto") == CPU
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr("utils.training.device.GPU_FILES", Path("/nowhere/nvidia[0-9]*"))
        assert choose_device("auto") == CPU
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("local_rank", "name", "device"),
        [
            (1, "auto", "cuda:1"),
            (1, "cpu", "cpu"),
            (1, "cuda:0", "training.device: cuda:0 is one GPU for 4 processes"),
            (2, "auto", "nproc: process 3 of this machine has no GPU, PyTorch sees 2; nproc=2"),
        ],
    )
    def test_is_not_that_of_another_process(self, monkeypatch, local_rank, name, device):
        for key, value in {"RANK": local_rank, "LOCAL_RANK": local_rank, "WORLD_SIZE": 4}.items():
            monkeypatch.setenv(key, str(value))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr("utils.training.device.why_unusable", lambda device: "")
        try:
            assert str(choose_device(name)) == device
        except UserError as error:
            assert str(error).startswith(device)  # noqa: PT017  # a case is one or the other


class TestPrecision:
    def test_of_bfloat16_is_refused_on_an_old_gpu_alone_and_a_line_says_what_is_faster(self, monkeypatch):
        old, new = (torch.device("cuda", number) for number in range(2))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0) if device == new else (7, 5))
        with pytest.raises(UserError, match=r"bf16 needs compute capability 8\.0, and Some GPU has 7\.5; fp32"):
            refuse_precision(old, "bf16")
        refuse_precision(old, "tf32")
        refuse_precision(CPU, "bf16")
        assert "tf32 is fp32 here, since Some GPU has 7.5" in precision_advice(old, "tf32")
        assert precision_advice(old, "fp32") == ""
        refuse_precision(new, "bf16")
        assert "training.precision=tf32 lets" in precision_advice(new, "fp32")
        assert precision_advice(new, "tf32") == precision_advice(CPU, "fp32") == ""

    def test_of_fp32_is_ieee_whatever_a_library_has_set(self):
        process = ReadyProcess(show_fp32_precision)
        assert process.ending() == (0, "")
        assert process.stdout.read() == "ieee ieee False False\ntf32 ieee True False\n"

    def test_of_bfloat16_keeps_the_teachers_weights_so_and_computes_the_same(self):
        teacher, image = get_model("resnet8", 5).eval().requires_grad_(False), torch.randn(2, 3, 16, 16)
        with autocast(CPU, "bf16"), torch.no_grad():
            expected = teacher(image)
            keep_in_bfloat16(teacher)
            assert torch.equal(teacher(image), expected)
        assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16, torch.float32}
        assert flops_without_computing(teacher, (16, 16)) > 0

    @pytest.mark.parametrize("network", [get_model("resnet8", 5), ToyNet().requires_grad_(False)])
    def test_of_bfloat16_leaves_trained_networks_and_those_of_others_alone(self, network):
        keep_in_bfloat16(network)
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("device", "before", "environment", "line", "threads"),
    [
        ("cpu", 1, None, "resumed on 1 threads as before, not 2", 1),
        ("cpu", 1, "2", "resumed on 2 threads (OMP_NUM_THREADS) instead of 1", 2),
        ("cpu", 1, "2, by the grid", "resumed on 1 threads as before, not 2", 1),
        ("cpu", 2, None, "", 2),
        ("cpu", None, None, "", 2),
        ("cuda", 1, None, "", 2),
    ],
)
def test_a_resumed_run_has_as_many_threads_as_before(monkeypatch, device, before, environment, line, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if environment == "2, by the grid":
        monkeypatch.setenv(SHARED_THREADS, "1")
    torch.set_num_threads(2)
    found = keep_threads(torch.device(device), before)
    assert found.startswith(line)
    assert bool(found) == bool(line)
    assert torch.get_num_threads() == threads


def test_a_gpu_evaluates_many_small_images_at_once():
    def size(device, side, **validation):
        config = SimpleNamespace(validation=SimpleNamespace(batch_size=validation.get("batch_size")))
        return val_batch_size(config, torch.device(device), SimpleNamespace(image_size=(side, side)))

    assert [size("cuda", side) for side in (8, 32, 64, 224)] == [1000, 1000, 256, 64]
    assert size("cpu", 32) == 64
    assert size("cuda", 32, batch_size=7) == 7


@pytest.mark.parametrize(("call", "capability"), [("FIND", (7, 5)), ("GET", (8, 0))])
def test_cudnn_without_a_workspace_is_out_of_memory(monkeypatch, call, capability):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    line = "cuda: out of memory; a smaller training.batch_size, "
    with pytest.raises(UserError, match=line) as caught, explaining_limits(torch.device("cuda")):
        raise RuntimeError(f"{call} was unable to find an engine to execute this computation")
    assert ("bf16" in str(caught.value)) == (capability == (8, 0))


def test_what_is_not_deterministic_on_a_gpu_is_one_line():
    said = (
        "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, ..."
    )
    line = "training.deterministic: true, but adaptive_max_pool2d_backward_cuda, .* is not deterministic; false trains"
    with pytest.raises(UserError, match=line), explaining_limits(torch.device("cuda")):
        raise RuntimeError(said)
