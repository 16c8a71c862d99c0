"""Which device to train on, in which precision, from which seed."""

from __future__ import annotations

import os

import torch

from utils.config import Config
from utils.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device called `name`; ``auto`` is CUDA where there is a GPU, else the CPU.

    Raises:
        UserError: a GPU is asked for that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"training.device: {name} asked for, but PyTorch sees {torch.cuda.device_count()} GPUs; "
            "auto takes what is there"
        )
    return device


def set_up(config: Config) -> None:
    """Seed everything that draws random numbers and set the precision of fp32 convolutions."""
    torch.manual_seed(config.training.seed)
    # Convolutions alone: a matrix product in TF32 would reach the losses, which keep float32 in every precision.
    torch.backends.cudnn.allow_tf32 = config.training.precision != "fp32"
    torch.backends.cuda.matmul.allow_tf32 = False
    if config.training.deterministic:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS is reproducible only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    else:
        torch.backends.cudnn.benchmark = True


def rng_state() -> dict[str, torch.Tensor]:
    """State of every generator that a training step may draw from."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
