"""Which device to train on, from which seed, and what its memory and generators are set to."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from utils.config import Config
from utils.errors import UserError, exhausted_memory, reason
from utils.files import warn_once
from utils.processes.rank import SHARED_THREADS, rank_info
from utils.training.precision import has_tensor_cores, set_precision

GPU_FILES = Path("/dev/nvidia[0-9]*")  # what NVIDIA's driver makes on Linux
OLDER_CUDA = "pip install torch torchvision --index-url https://download.pytorch.org/whl/cu126 serves older ones"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """The device called `name`, a GPU with its number; ``auto`` is CUDA where there is a GPU, else the CPU.

    Of several processes on one machine each has a GPU of its own, in the order of their numbers. A warning says so if
    ``auto`` leaves a GPU unused.

    Raises:
        UserError: a GPU is asked for that is not there or cannot be used, or one for several processes, or `name` is
            no device.
    """
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError:
        raise UserError(f"training.device: found {name!r}, must be auto, cpu, cuda or cuda:N") from None
    if device.type != "cuda":
        return device
    is_several = rank_info().world > 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's are of several lines, `cause` is one
        is_there = torch.cuda.is_available()
        if is_several and is_there:
            device = _own_gpu(device)
        device = torch.device("cuda", device.index or 0)
        cause = why_unusable(device)
    if not cause:
        return device
    if name != "auto" or (is_several and is_there):  # the other processes may have taken theirs
        raise UserError(f"training.device: PyTorch cannot use {name}: {cause}; auto takes what is there")
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if is_there or (any(GPU_FILES.parent.glob(GPU_FILES.name)) and not hidden):
        warn_once(f"training.device: auto takes the CPU, since PyTorch cannot use the GPU of this machine: {cause}")
    return torch.device("cpu")


def why_unusable(device: torch.device) -> str:
    """What PyTorch says when it computes on a GPU, which is the current one from then on; empty if nothing is wrong.

    The driver may be too old, PyTorch may be built for the CPU alone or without kernels for this GPU, the GPU may not
    be there or be another program's.
    """
    try:
        torch.cuda.init()
        torch.cuda.set_device(device)  # what names no device, such as the default generator, then means this one
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)
    except (RuntimeError, AssertionError) as error:
        cause = reason(error, 240)
        return f"{cause} ({OLDER_CUDA})" if "is too old" in cause or "no kernel image" in cause else cause
    return ""


def _own_gpu(device: torch.device) -> torch.device:
    local_rank, count = rank_info().local_rank, torch.cuda.device_count()
    if device.index is not None:
        raise UserError(
            f"training.device: {device} is one GPU for {rank_info().world} processes; cuda gives each its own"
        )
    if local_rank >= count:
        raise UserError(
            f"nproc: process {local_rank + 1} of this machine has no GPU, PyTorch sees {count}; nproc={count} uses "
            "them all, training.device=cpu none"
        )
    return torch.device("cuda", local_rank)


def set_up(config: Config) -> None:
    """Seed PyTorch, from which every random number here is drawn, and set how a GPU computes."""
    torch.manual_seed(config.training.seed)
    set_backends(config)


def set_backends(config: Config) -> None:
    """Set the precision of fp32 convolutions, and whether only deterministic kernels may be used."""
    set_precision(config.training.precision)
    deterministic = config.training.deterministic
    if deterministic:
        # cuBLAS is reproducible only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The run before in this process, a teacher's, may have had it otherwise. The call imports PyTorch's compiler, which
    # takes seconds.
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def explaining_limits(device: torch.device) -> Iterator[None]:
    """Turn what is raised when memory is exhausted, or an operation is not deterministic, into a line with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if "does not have a deterministic implementation" in str(error):
            raise UserError(
                f"training.deterministic: true, but {str(error).split()[0]}, which a network or distiller calls, is "
                "not deterministic; false trains with it"
            ) from error
        line = exhausted_memory(error)
        if line is None:
            raise
        others = ["training.precision=bf16"] if has_tensor_cores(device) else []
        others += ["training.cuda_graph=false"] if device.type == "cuda" else []
        raise UserError(
            f"{device}: {line}; a smaller training.batch_size, dataset.img_h or kd_loss.feat_dim takes less, and so "
            f"does {' or '.join(others)}"
        ) from error


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep what a step on a CPU frees for the next one; say whether it does, which takes glibc.

    Left alone, it hands large blocks back to the system and asks for them anew in every step, to be cleared page by
    page. On two cores that took a quarter of a KD step of ResNet50 to MobileNetV2, whose maps are beyond the 32 MiB
    which glibc never keeps, a sixth of an epoch of wrn_16_2 at 64 pixels, and nothing that could be measured of vgg13
    to vgg8 at 32. In return the process takes more memory, 15 % there. ``MALLOC_TRIM_THRESHOLD_`` in the environment
    wins.
    """
    if device.type != "cpu" or sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def keep_threads(device: torch.device, before: int | None) -> str:
    """Compute on a CPU with as many threads as `before`, since another number rounds differently.

    ``OMP_NUM_THREADS`` wins if the user has set it.

    Returns:
        a line about it for the log; empty if the number is the same, or not known.
    """
    now = torch.get_num_threads()
    if device.type != "cpu" or before in (None, now):
        return ""
    if "OMP_NUM_THREADS" in os.environ and SHARED_THREADS not in os.environ:
        return f"resumed on {now} threads (OMP_NUM_THREADS) instead of {before}, which rounds differently"
    torch.set_num_threads(before)
    return (
        f"resumed on {before} threads as before, not {now}, which would round differently; OMP_NUM_THREADS=<number> "
        "chooses"
    )


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """State of every generator that a training step on `device` may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Restore what `rng_state` gave; a run that moves to another kind of device draws anew there."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
