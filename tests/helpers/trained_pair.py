"""A distilled run as training leaves it, but written within a second."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.config import Config
from utils.training.run import train


def trained_pair(root: Path) -> Path:
    """Train resnet8 on digits for one epoch, and distil it into another one; the folder of the second run."""
    torch.set_num_threads(1)
    common = {
        "dataset": {"name": "digits", "img_h": 16, "img_w": 16},
        "training": {"epochs": 1, "batch_size": 256, "num_workers": 0, "device": "cpu"},
        "validation": {"batch_size": 256, "num_workers": 0},
        "run": {"root": str(root)},
    }
    train(Config.from_dict(common | {"model": {"name": "resnet8"}}))
    pair = {"teacher": {"name": "resnet8"}, "student": {"name": "resnet8"}}
    config = Config.from_dict(common | {"kd": pair, "kd_loss": {"name": "sp"}})
    train(config)
    return config.run_dir
