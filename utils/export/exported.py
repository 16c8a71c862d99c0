"""Networks in exported files: read, run, and told how images become their input."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import Source
from utils.errors import UserError, doing
from utils.files import check_regular

ENDINGS = (".onnx", ".pt2")
DESCRIPTION = "description.json"  # within a .pt2 file


class OnnxNetwork(nn.Module):
    """An ONNX file, run by ONNX Runtime on the CPU.

    Args:
        file: with one input ``[B, 3, H, W]`` and one output.
        threads: None: as many as PyTorch uses.

    Attributes:
        description: the metadata of the file, each value as JSON.
        batch: how many images it takes at a time; None: any number.
    """

    def __init__(self, file: Path, threads: int | None = None):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.log_severity_level = 3  # errors alone
        self._session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self.description = self._session.get_modelmeta().custom_metadata_map
        size = self._session.get_inputs()[0].shape[0]
        self.batch = size if isinstance(size, int) else None

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of normalised images ``[B, 3, H, W]``."""
        return torch.cat([self._run(part) for part in images.split(self.batch or len(images))])

    def _run(self, images: Tensor) -> Tensor:
        missing = (self.batch or len(images)) - len(images)
        filled = F.pad(images, (0, 0) * 3 + (0, missing))
        (logits,) = self._session.run(None, {self._session.get_inputs()[0].name: filled.numpy()})
        return torch.from_numpy(logits[: len(images)])


def open_exported(file: Path, *, trust: bool = False) -> tuple[nn.Module, Source]:
    """The network in a file that `utils.export` wrote, and its images and classes.

    Args:
        file: one of the `ENDINGS`.
        trust: read a program of torch.export, which may run code.

    Raises:
        UserError: it cannot be read, or does not say how images are prepared.
    """
    if file.suffix == ".onnx":
        require("onnxruntime")
    elif not trust:
        raise UserError(f"{file}: PyTorch unpickles such a file, which may run code in it; --trust agrees to that")
    with doing(f"reading {file}"):
        check_regular(file)
        if file.suffix == ".onnx":
            network = OnnxNetwork(file)
            texts = network.description
        else:
            texts = {DESCRIPTION: "{}"}
            network = torch.export.load(file, extra_files=texts).module()
            texts = json.loads(texts[DESCRIPTION])
    try:
        return network, Source.of({key: json.loads(text) for key, text in texts.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{file}: does not say how images are prepared and what the classes are; python -m utils.export writes "
            "files that do"
        ) from error


def require(*packages: str) -> None:
    """Raise a UserError with the command that installs those of the packages that are missing."""
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: python -m pip install {' '.join(missing)}")


def as_texts(description: dict[str, Any]) -> dict[str, str]:
    """A description as files hold it: each value as JSON."""
    return {key: json.dumps(value) for key, value in description.items()}
