"""In which precision, and in which layout of memory, networks compute."""

from __future__ import annotations

import torch
from torch import nn

from distillers.task import Task
from models.cut.view import StagedView
from utils.config import Config
from utils.errors import UserError, reason
from utils.training.log import log

_AMPERE = (8, 0)  # compute capability of the first GPUs with bfloat16 and TF32


def set_precision(precision: str) -> None:
    """Set what float32 convolutions on a GPU may compute in: TF32, unless `precision` is ``"fp32"``."""
    # Convolutions alone: a matrix product in TF32 would reach the losses, which keep float32 in every precision.
    # PyTorch has old and new flags for the same. A library, or the environment, may have set the new ones.
    is_fp32 = precision == "fp32"
    torch.backends.cudnn.allow_tf32 = not is_fp32
    for operations in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        operations.fp32_precision = "ieee" if is_fp32 else "tf32"
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.matmul.fp32_precision = "ieee"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a forward pass."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def refuse_precision(device: torch.device, precision: str, option: str = "training.precision") -> None:
    """Raise a UserError, which names the `option`, if a GPU has no bfloat16: PyTorch would imitate it slowly."""
    if precision == "bf16" and not has_tensor_cores(device):
        raise UserError(
            f"{option}: bf16 needs compute capability {_AMPERE[0]}.{_AMPERE[1]}, and {_name(device)}; fp32 works there"
        )


def precision_advice(device: torch.device, precision: str) -> str:
    """A line if a GPU has faster tensor cores than `precision` uses, or lacks those that it asks for; else empty."""
    if device.type != "cuda":
        return ""
    if not has_tensor_cores(device):
        return f"training.precision=tf32 is fp32 here, since {_name(device)}" if precision == "tf32" else ""
    if precision != "fp32":
        return ""
    return "fp32 is IEEE float32; training.precision=tf32 lets convolutions use the tensor cores of this GPU"


def has_tensor_cores(device: torch.device) -> bool:
    """Whether a device computes in bfloat16 or, a GPU, in TF32."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _AMPERE


def _name(device: torch.device) -> str:
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} has {major}.{minor}"


def place_task(task: Task, config: Config, device: torch.device, image_size: tuple[int, int]) -> Task:
    """Move `task` to `device`, with the channels of its maps last in memory where that pays or is asked for.

    The layout of the weights decides: every convolution hands it on to its output.

    Raises:
        UserError: it is asked for, but a network cannot do with it.
    """
    setting, precision = config.training.channels_last, config.training.precision
    task.to(device)
    if setting is True or (setting == "auto" and channels_last_pays(device, precision)):
        task.to(memory_format=torch.channels_last)
        try:
            for network in task.networks():
                network.feature_shapes(*image_size)
        except RuntimeError as error:  # a user's own network, which says view() of a map
            if setting is True:
                line = f"training.channels_last: true, but a network fails: {reason(error)}; try auto"
                raise UserError(line) from error
            log.info("training.channels_last: off, a network fails with it: %s", reason(error))
            task.to(memory_format=torch.contiguous_format)
    if precision == "bf16":
        for network in task.networks():
            keep_in_bfloat16(network)
    return task


def keep_in_bfloat16(network: nn.Module) -> None:
    """Cast the weights of a frozen network of ours that autocast would cast at every use, to the same numbers.

    Autocast remembers casts of trained weights alone. A network of a user may use its weights in other ways.
    """
    ours = type(network).__module__.startswith("models.") and not isinstance(network, StagedView)
    if not ours or any(parameter.requires_grad for parameter in network.parameters()):
        return
    for layer in network.modules():
        if type(layer) in (nn.Conv2d, nn.Linear):
            layer.bfloat16()


def channels_last_pays(device: torch.device, precision: str) -> bool:
    """Whether convolutions are faster so: always on a CPU (measured), on a GPU for its tensor cores alone."""
    return device.type != "cuda" or (precision != "fp32" and has_tensor_cores(device))
