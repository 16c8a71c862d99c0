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
    kept = keep_freed_memory(torch.device("cpu"))
    pages = []
    for _ in range(20):  # in a forked process it takes up to six to fill the gaps in the heap
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # 64 MiB, more than glibc would keep
        pages.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    print(kept, min(pages))


def new_pages(**variables):
    process = ReadyProcess(count_new_pages, variables)  # its own, for what is kept cannot be given up
    assert process.ending() == (0, "")
    kept, pages = process.stdout.read().split()
    return kept == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_tensor_takes_the_place_of_the_one_before():
    kept, pages = new_pages()
    assert kept
    assert pages < 1000


def test_who_has_chosen_otherwise_is_not_overruled():
    kept, pages = new_pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert pages > 1000


def show_fp32_precision():
    """Of convolutions and matrix products, by the new flags and the old ones."""
    torch.backends.fp32_precision = "tf32"
    for precision in ("fp32", "tf32"):
        set_precision(precision)
        cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
        print(cudnn.conv.fp32_precision, matmul.fp32_precision, cudnn.allow_tf32, matmul.allow_tf32)


class TestAGpuThatCannotBeUsed:
    @pytest.fixture(autouse=True)
    def _this_process_has_said_nothing(self):
        warn_once.cache_clear()
        yield
        warn_once.cache_clear()

    @pytest.fixture
    def broken(self, monkeypatch, tmp_path):
        """The system has a GPU, and PyTorch none; `torch.cuda.init` raises what is given."""
        (tmp_path / "nvidia3").touch()

        def break_with(error):
            def init():
                raise error

            monkeypatch.setattr("utils.training.device.GPU_FILES", tmp_path / "nvidia[0-9]*")
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
            monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
            monkeypatch.setattr(torch.cuda, "init", init)
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

        return break_with

    @pytest.mark.parametrize(
        "error",
        [
            RuntimeError("The NVIDIA driver on your system is too old\n(found version 11040)."),
            AssertionError("Torch not compiled with CUDA enabled"),
        ],
        ids=["driver", "wheel"],
    )
    def test_is_one_warning_line_and_not_silently_the_cpu(self, broken, caplog, error):
        broken(error)
        assert [choose_device("auto") for _ in range(2)] == [torch.device("cpu")] * 2
        cause = " ".join(str(error).split())
        (line,) = [record.getMessage() for record in caplog.records]
        assert f"auto takes the CPU, since PyTorch cannot use the GPU of this machine: {cause}" in line
        assert ("whl/cu126" in line) == ("too old" in line)
        with pytest.raises(UserError, match=r"training.device: cuda:0 asked for, but PyTorch sees 0 GPUs \(") as caught:
            choose_device("cuda:0")
        assert cause in str(caught.value)

    def test_is_no_matter_where_it_is_hidden_or_not_there(self, broken, caplog, monkeypatch):
        broken(RuntimeError("never asked"))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert choose_device("auto") == torch.device("cpu")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        monkeypatch.setattr("utils.training.device.GPU_FILES", Path("/nowhere/nvidia[0-9]*"))
        assert choose_device("auto") == torch.device("cpu")
        assert caplog.records == []

    @pytest.mark.parametrize(
        ("capability", "built", "usable"),
        [
            ((7, 0), "sm_75 sm_80 sm_90 sm_120", False),
            ((8, 6), "sm_75 sm_80 sm_90", True),  # code of one generation runs on its later members
            ((7, 5), "sm_80 compute_80", False),
            ((13, 0), "sm_90 compute_120", True),  # translated by the driver
            ((9, 1), "sm_90a", False),  # for this very one
        ],
    )
    def test_is_one_that_pytorch_is_not_built_for(self, monkeypatch, caplog, capability, built, usable):
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_arch_list", built.split)
        if usable:
            assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
            assert caplog.records == []
            return
        assert choose_device("auto") == torch.device("cpu")
        number = ".".join(map(str, capability))
        missing = f"is not built for Old GPU of compute capability {number}, only for {built}"
        (record,) = caplog.records
        chosen = f"training.device: auto takes the CPU, since PyTorch {torch.__version__} {missing}"
        assert record.getMessage().startswith(chosen)
        with pytest.raises(
            UserError, match=rf"device: PyTorch .* {missing} \(.*whl/cu126 .*; training.device=cpu takes"
        ):
            choose_device("cuda")


class TestPrecision:
    @pytest.fixture
    def gpu(self, monkeypatch):
        """A GPU of the compute capability that it is called with."""

        def of(capability):
            monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
            return torch.device("cuda:0")

        return of

    def test_of_bfloat16_is_refused_on_an_old_gpu_alone(self, gpu):
        with pytest.raises(UserError, match=r"bf16 needs compute capability 8\.0, and Some GPU has 7\.5; fp32"):
            refuse_precision(gpu((7, 5)), "bf16")
        for device, precision in ((gpu((7, 5)), "tf32"), (gpu((8, 0)), "bf16"), (CPU, "bf16")):
            refuse_precision(device, precision)

    def test_has_a_line_where_it_is_not_what_one_would_think(self, gpu):
        assert "tf32 is fp32 here, since Some GPU has 7.5" in precision_advice(gpu((7, 5)), "tf32")
        assert precision_advice(gpu((7, 5)), "fp32") == ""
        assert "training.precision=tf32 lets" in precision_advice(gpu((9, 0)), "fp32")
        assert precision_advice(gpu((9, 0)), "tf32") == precision_advice(CPU, "fp32") == ""

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


class TestThreads:
    @pytest.fixture(autouse=True)
    def _two_threads(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def test_of_a_resumed_run_are_as_many_as_before(self):
        assert keep_threads(CPU, 1).startswith("resumed on 1 threads as before, not 2")
        assert torch.get_num_threads() == 1

    def test_are_what_the_environment_says(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        assert keep_threads(CPU, 1).startswith("resumed on 2 threads (OMP_NUM_THREADS) instead of 1")
        assert torch.get_num_threads() == 2

    @pytest.mark.parametrize(("device", "before"), [(CPU, 2), (CPU, None), (torch.device("cuda"), 1)])
    def test_need_no_word_where_nothing_changes(self, device, before):
        assert keep_threads(device, before) == ""
        assert torch.get_num_threads() == 2


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


def test_tests_for_a_gpu_run_in_one_process_and_all_others_see_none(pytestconfig):
    def workers(expression):
        options = SimpleNamespace(markexpr=expression, numprocesses="auto")
        return pytestconfig.hook.pytest_xdist_auto_num_workers(config=SimpleNamespace(option=options))

    assert workers("gpu") == workers("slow or gpu") == 0
    assert workers("not slow") == workers("not gpu") != 0
    if "gpu" not in pytestconfig.option.markexpr:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


def test_what_is_not_deterministic_on_a_gpu_is_one_line():
    said = (
        "adaptive_max_pool2d_backward_cuda does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, ..."
    )
    line = "training.deterministic: true, but adaptive_max_pool2d_backward_cuda, .* is not deterministic; false trains"
    with pytest.raises(UserError, match=line), explaining_limits(torch.device("cuda")):
        raise RuntimeError(said)
