"""Which device to train on, in which precision, from which seed."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distillers.task import Task
from utils.config import Config
from utils.errors import UserError, exhausted_memory, reason
from utils.processes.place import rank_info

log = logging.getLogger("sakd")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def choose_device(name: str) -> torch.device:
    """The device called `name`, a GPU with its number; ``auto`` is CUDA where there is a GPU, else the CPU.

    Of several processes on one machine each has a GPU of its own, in the order of their numbers.

    Raises:
        UserError: a GPU is asked for that is not there, or one for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if rank_info().world > 1:
        device = _own_gpu(device)
    device = torch.device("cuda", device.index or 0)
    if device.index >= torch.cuda.device_count():
        raise UserError(
            f"training.device: {name} asked for, but PyTorch sees {torch.cuda.device_count()} GPUs; "
            "auto takes what is there"
        )
    torch.cuda.set_device(device)  # what names no device, such as the default generator, then means this one
    return device


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
    """Seed everything that draws random numbers and set the precision of fp32 convolutions."""
    torch.manual_seed(config.training.seed)
    set_precision(config.training.precision)
    deterministic = config.training.deterministic
    if deterministic:
        # cuBLAS is reproducible only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Both ways: the run before in this process, a teacher's, may have had it otherwise.
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def naming_exhausted_memory(device: torch.device) -> Iterator[None]:
    """Turn what is raised when the memory of a GPU or of the machine is exhausted into a line with advice."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        line = exhausted_memory(error)
        if line is None:
            raise
        graph = " and training.cuda_graph=false" if device.type == "cuda" else ""
        raise UserError(
            f"{device}: {line}; a smaller training.batch_size, dataset.img_h or kd_loss.feat_dim takes less, and so "
            f"does training.precision=bf16{graph}"
        ) from error


def keep_freed_memory(device: torch.device) -> bool:
    """Have the C library keep what a step on a CPU frees for the next one; say whether it does, which takes glibc.

    Left alone, it hands large blocks back to the system and asks for them anew in every step, to be cleared page by
    page. On two cores that took a quarter of a KD step of ResNet50 to MobileNetV2, whose maps are beyond the 32 MiB
    which glibc never keeps, a sixth of an epoch of wrn_16_2 at 64 pixels, and nothing that could be measured of vgg13
    to vgg8 at 32. In return the process takes more memory, 15 % there, so whoever has set ``MALLOC_TRIM_THRESHOLD_``
    in the environment is not overruled.
    """
    if device.type != "cpu" or sys.platform != "linux" or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))


def set_precision(precision: str) -> None:
    """Set what float32 convolutions on a GPU may compute in: TF32, unless `precision` is ``"fp32"``."""
    # Convolutions alone: a matrix product in TF32 would reach the losses, which keep float32 in every precision.
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def place_task(task: Task, config: Config, device: torch.device, image_size: tuple[int, int]) -> Task:
    """Move `task` to `device`, with the channels of its maps last in memory where that pays or is asked for.

    The layout of the weights decides: every convolution hands it on to its output.

    Raises:
        UserError: it is asked for, but a network cannot do with it.
    """
    setting = config.training.channels_last
    if setting == "auto":
        setting = channels_last_pays(device, config.training.precision)
    task.to(device)
    if not setting:
        return task
    task.to(memory_format=torch.channels_last)
    try:
        for network in task.networks():
            network.feature_shapes(*image_size)
    except RuntimeError as error:  # a user's own network, which says view() of a map
        if config.training.channels_last is True:
            raise UserError(f"training.channels_last: true, but a network fails: {reason(error)}; try auto") from error
        log.info("training.channels_last: off, a network fails with it: %s", reason(error))
        task.to(memory_format=torch.contiguous_format)
    return task


def channels_last_pays(device: torch.device, precision: str) -> bool:
    """Whether convolutions are faster so: always on a CPU (measured), on a GPU for its tensor cores alone."""
    return device.type != "cuda" or precision != "fp32"


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
