"""A distilled run as training leaves it, but written within a second."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml

from utils.config import Config
from utils.run_folder.folder import RunDir
from utils.training.build import build_distillation, build_single, load_data
from utils.training.device import set_up
from utils.training.engine import Engine

CPU = torch.device("cpu")


def trained_pair(root: Path, selection: str = "adaptive", distiller: str = "kd") -> Path:
    """Train resnet8 on digits for one epoch, and distil it into another one; the folder of the second run."""
    torch.set_num_threads(1)
    common = {
        "dataset": {"name": "digits"},
        "training": {"epochs": 1, "batch_size": 256, "num_workers": 0, "device": "cpu"},
        "validation": {"batch_size": 256, "num_workers": 0},
        "run": {"root": str(root)},
    }
    _train(Config.from_dict(common | {"model": {"name": "resnet8"}}), build_single)
    pair = {"teacher": {"name": "resnet8"}, "student": {"name": "resnet8"}, "selection": selection}
    return _train(Config.from_dict(common | {"kd": pair, "kd_loss": {"name": distiller}}), build_distillation)


def _train(config: Config, build) -> Path:
    set_up(config)
    data = load_data(config, CPU)
    phases, result = build(config, data, CPU)
    run = RunDir(config.run_dir)
    run.open(resume=False, overwrite=False)
    run.config.write_text(yaml.safe_dump(config.to_dict()), encoding="utf-8")
    run.write_result(result | Engine(phases, data, run, config, CPU).fit())
    run.close()
    return run.path
