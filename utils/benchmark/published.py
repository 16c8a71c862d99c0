"""Training steps of the published code, run as it is from a checkout, in a process of its own.

The checkout is that of github.com/zju-vipa/spot-adaptive-pytorch. `published_child` runs in the process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from models import get_model
from utils.benchmark.cases import SEED, Conditions, Pair
from utils.errors import UserError

NEGATIVES = 16_384  # of CRD, as published
CHILD = Path(__file__).with_name("published_child.py")


def check_published(folder: Path) -> None:
    """Raise a UserError unless the folder is a checkout of the published code."""
    missing = next((name for name in ("train.py", "configs", "distiller_zoo") if not (folder / name).exists()), None)
    if missing:
        raise UserError(f"{folder}: no checkout of the published code, it lacks {missing}; --published <folder>")


class PublishedSteps:
    """Adaptive steps of one pair and distiller, with the checkout's own config. A context manager.

    Args:
        folder: the checkout.
        pair: the networks, untrained.
        distiller: its name here.
        conditions: of the measurement; the code knows float32 only.

    Raises:
        UserError: it has no config for this, or fails; the line has its error.
    """

    def __init__(self, folder: Path, pair: Pair, distiller: str, conditions: Conditions):
        config = folder / "configs" / "cifar-100" / f"seed-{SEED}" / distiller / f"{pair}.yml"
        if not config.exists():
            raise UserError(f"{config}: no such file")
        if conditions.precision != "fp32":
            raise UserError(f"it has no {conditions.precision}")
        self._files = tempfile.TemporaryDirectory()
        files = Path(self._files.name)
        teacher = get_model(pair.teacher, conditions.num_classes)
        torch.save({"model": teacher.state_dict()}, files / "teacher.pth")
        torch.save([value.cpu() for value in conditions.batch()], files / "batch.pth")
        job = {
            "config": str(config.resolve()),
            "files": str(files),
            "num_classes": conditions.num_classes,
            "samples": conditions.samples,
            "negatives": min(NEGATIVES, conditions.samples - 1),
            "threads": torch.get_num_threads(),
        }
        self._errors = (files / "errors.txt").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD), json.dumps(job)],
            cwd=folder,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": _visible(conditions.device)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self.step()

    def step(self) -> None:
        """One step; returns when the device is done with it."""
        try:
            self._process.stdin.write(b"\n")
            self._process.stdin.flush()
            done = self._process.stdout.readline()
        except BrokenPipeError:
            done = b""
        if not done:
            self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().strip().splitlines() or [f"exit code {self._process.returncode}"]
            self.close()
            raise UserError(lines[-1])

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._errors.close()
        self._files.cleanup()

    def __enter__(self) -> PublishedSteps:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _visible(device: torch.device) -> str:
    """``CUDA_VISIBLE_DEVICES`` of a process that is to see this device alone."""
    if device.type != "cuda":
        return ""
    index = device.index or 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[index] if visible else str(index)
