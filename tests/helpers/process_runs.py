"""Whole runs of the entry points, small enough to be had by the dozen: 24 images of 16x16, resnet8 from resnet8."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from pictures import image_folder
from ready_process import ReadyProcess, run_script

from models import get_model
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir

STEPS = 8  # per epoch


def prepare(folder: Path) -> Path:
    """Put images and a teacher into `folder`."""
    image_folder(folder / "images", train=4 * STEPS, val=4, size=(16, 16))
    torch.manual_seed(5)
    torch.save(get_model("resnet8", 2).state_dict(), folder / "teacher.pth")
    return folder


def config_file(folder: Path, distiller: str | None = "at", selection: str = "adaptive", **keys: dict) -> Path:
    """A config in `folder` that is trained on what `prepare` put there; `keys` are merged into its sections."""
    config: dict[str, dict[str, Any]] = {
        "dataset": {"name": "imagefolder", "root": str(folder / "images"), "img_h": 16, "img_w": 16},
        "training": {
            "epochs": 4,
            "batch_size": 8,
            "num_workers": 0,
            "lr_decay_epochs": [1, 2],
            "print_iter_freq": 3,
            "save_every_steps": 2,
            "save_ep_freq": 1,
            "keep_checkpoints": 1,
            "device": "cpu",
        },
        "validation": {"batch_size": 8, "num_workers": 0},
        "pretrain": {"epochs": 2},
        "run": {"root": str(folder / "run")},
    }
    if distiller is None:
        config["model"] = {"name": "resnet8"}
    else:
        teacher = {"name": "resnet8", "checkpoint": str(folder / "teacher.pth")}
        config["kd"] = {"teacher": teacher, "student": {"name": "resnet8"}, "selection": selection}
        config["kd_loss"] = {"name": distiller, "options": {"negatives": 16} if distiller == "crd" else {}}
    for section, values in keys.items():
        config[section] |= values
    path = folder / f"{distiller}-{selection}.yml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, *words: str, **options) -> ReadyProcess:
    """``python train.py`` (or ``train_single.py``) on a config, in a process of its own."""
    return ReadyProcess(run_script, *command(config), *words, **options)


def command(config: Path) -> list[str]:
    """The entry point of a config, and its words."""
    return ["train_single.py" if "None" in config.name else "train.py", "--config", str(config)]


def fingerprint(run: RunDir) -> dict[str, str]:
    """A hash of everything that a run leaves behind, except times of day and durations."""
    contents: dict[str, Any] = {}
    for path in run.last.parent.glob("*.pth"):
        if path != run.previous:
            contents[path.name] = read_checkpoint(path) | {"config": ""}  # which names the folder
    for file in (run.metrics, run.gates):
        lines = file.read_text().splitlines() if file.exists() else []
        contents[file.name] = [json.loads(line) | {"seconds": 0} for line in lines]
    contents["result"] = json.loads(run.result.read_text()) | {"checkpoint": ""}
    return {name: _digest(json.dumps(content, default=_tensor).encode()) for name, content in contents.items()}


def _tensor(value: torch.Tensor) -> list[str]:
    return [f"{value.dtype} {tuple(value.shape)}", _digest(value.contiguous().numpy().tobytes())]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
