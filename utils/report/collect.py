"""Reading run folders: what was run, how far it got, and what came out. Nothing here needs PyTorch."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from utils.config.changes import flatten
from utils.config.names import model_label
from utils.errors import UserError

Status = Literal["finished", "running", "stopped"]

ALONE = "alone"  # stands where a distilled run has its distiller
SINGLE = "single"  # stands where a distilled run has its selection

# Keys that say where or how fast a run goes, but not what it computes.
INCIDENTAL = (
    "run", "validation", "dataset.root", "dataset.loader", "training.seed", "training.num_workers", "training.device",
    "training.save_ep_freq", "training.save_every_steps", "training.gate_samples_freq", "training.print_iter_freq",
    "training.gpu_preserve", "training.deterministic", "training.cuda_graph", "training.channels_last",
    "model.label", "kd.selection", "kd.teacher.checkpoint", "kd.teacher.label", "kd.student.label", "kd_loss.T",
)  # fmt: skip


@dataclass(frozen=True)
class GateShares:
    """Share of each class's samples distilled at each spot in one epoch.

    Attributes:
        epoch: which one, phases counted together.
        gates: names of the gates, the logits' last.
        shares: ``[num_classes, K + 1]`` in [0, 1]; NaN for a class not seen.
    """

    epoch: int
    gates: list[str]
    shares: np.ndarray


@dataclass(frozen=True)
class GateSamples:
    """How often every training sample was distilled at each spot.

    Attributes:
        epochs: how many epochs were counted.
        gates: names of the gates.
        frequency: ``[N, K + 1]`` in [0, 1], over those epochs.
    """

    epochs: int
    gates: list[str]
    frequency: np.ndarray


@dataclass(frozen=True)
class Run:
    """One run folder as it stands now.

    Attributes:
        path: the folder.
        config: as written by the run, plain dicts.
        records: the lines of ``metrics.jsonl`` that belong to the training proper, in order.
        status: ``running`` while a process holds the folder; ``finished`` if every epoch of the config is done.
    """

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    status: Status
    result: dict[str, Any]

    @property
    def dataset(self) -> str:
        """The label that groups runs; `dataset_name` is what the data set is."""
        return self.config["dataset"]["label"] or self.dataset_name

    @property
    def dataset_name(self) -> str:
        return self.config["dataset"]["name"]

    @property
    def seed(self) -> int:
        return self.config["training"]["seed"]

    @property
    def is_single(self) -> bool:
        return self.config.get("kd") is None

    @property
    def student(self) -> str:
        """The network that is trained."""
        return _title(self.config["model"] if self.is_single else self.config["kd"]["student"])

    @property
    def teacher(self) -> str:
        return "" if self.is_single else _title(self.config["kd"]["teacher"])

    @property
    def distiller(self) -> str:
        return ALONE if self.is_single else self.config["kd_loss"]["name"]

    @property
    def selection(self) -> str:
        return SINGLE if self.is_single else self.config["kd"]["selection"]

    @property
    def pair(self) -> str:
        """``"vgg13 → vgg8"``, or the network alone."""
        return self.student if self.is_single else f"{self.teacher} → {self.student}"

    @property
    def title(self) -> str:
        what = ALONE if self.is_single else f"{self.distiller}, {self.selection}"
        return f"{self.pair}, {what}, seed {self.seed}"

    @property
    def has_policy(self) -> bool:
        return self.selection in ("adaptive", "anti")

    @property
    def epochs(self) -> int:
        """Epochs that the config asks for."""
        return self.config["training"]["epochs"]

    @property
    def epochs_done(self) -> int:
        return self.records[-1]["epoch"] if self.records else 0

    @property
    def progress(self) -> str:
        """``"running 37/240"``."""
        return f"{self.status} {self.epochs_done}/{self.epochs}"

    @property
    def last_top1(self) -> float | None:
        """Validation accuracy after the last epoch so far, percent."""
        return self.records[-1]["val"]["top1"] if self.records else None

    @property
    def best_top1(self) -> float | None:
        """The best validation accuracy so far, percent."""
        return max((record["val"]["top1"] for record in self.records), default=None)

    @property
    def teacher_top1(self) -> float | None:
        """Validation accuracy of the teacher's checkpoint, known once the run is finished."""
        return self.result.get("teacher_top1")

    @property
    def seconds(self) -> float:
        """Spent on the recorded epochs."""
        return sum(record["seconds"] for record in self.records)

    @property
    def gate_labels(self) -> list[str]:
        """Names of the gates, the logits' last."""
        names = self.records[-1]["train"] if self.records else {}
        return [name.removeprefix("gate/") for name in names if name.startswith("gate/")]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the outcome, seed and selection apart: flat ``{"training.lr": 0.05, ...}``."""
        return effective_settings(self.config)

    def final_gates(self) -> GateShares | None:
        return read_gate_shares(self.path / "gates.jsonl")

    def gate_samples(self) -> GateSamples | None:
        return read_gate_samples(self.path / "gates")


def collect(paths: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, sorted by data set, pair, distiller, selection, seed and path.

    Raises:
        UserError: a folder does not exist, or there is no run at all.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give run folders, or a folder above them")
        folders |= dict.fromkeys(file.parent for file in path.rglob("config.yml"))
    runs = [run for run in map(read_run, folders) if run is not None]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: holds no run (a folder with config.yml)")
    runs.sort(key=lambda run: (run.dataset, run.is_single, run.pair, run.distiller, run.selection, run.seed, run.path))
    return runs


def read_run(path: Path) -> Run | None:
    """The run in `path`; None if its ``config.yml`` is not one of ours."""
    config = yaml.safe_load((path / "config.yml").read_text(encoding="utf-8"))
    if not isinstance(config, dict) or not {"dataset", "training", "run"} <= config.keys():
        return None
    lines = read_json_lines(path / "metrics.jsonl")
    records = [line for line in lines if line["phase"] == "train"]
    file = path / "result.json"
    result = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    # A finished run may have been resumed with more epochs; the old result then says nothing of where it is now.
    done = bool(result and records and records[-1]["epoch"] >= config["training"]["epochs"])
    status: Status = "running" if is_locked(path / ".lock") else "finished" if done else "stopped"
    return Run(path, config, records, status, result)


def is_locked(lock: Path) -> bool:
    """Whether a training process holds the lock of a run folder."""
    try:
        with lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # let go as the file is closed
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines of a ``.jsonl`` file; the last may still be being written."""
    if not file.exists():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_gate_shares(file: Path) -> GateShares | None:
    """The newest line of a ``gates.jsonl``, or None."""
    lines = read_json_lines(file)
    if not lines:
        return None
    line = lines[-1]
    return GateShares(line["global_epoch"], line["gates"], np.array(line["classes"], dtype=float))


def read_gate_samples(folder: Path) -> GateSamples | None:
    """The newest of a run's ``gates/epoch-N.npz``, or None; each counts from the beginning."""
    files = {int(file.stem.removeprefix("epoch-")): file for file in folder.glob("epoch-*.npz")}
    if not files:
        return None
    with np.load(files[max(files)]) as content:
        seen = content["seen"]
        frequency = content["distilled"] / np.maximum(seen, 1)[:, None]
        return GateSamples(int(seen.max()), content["labels"].tolist(), frequency)


def _title(network: dict[str, Any]) -> str:
    return model_label(network["name"], network.get("kwargs"), network.get("label"))


def effective_settings(config: dict[str, Any]) -> dict[str, Any]:
    """`config` flattened, without the keys in `INCIDENTAL`."""
    flat = flatten(config)
    return {k: v for k, v in flat.items() if not any(k == name or k.startswith(f"{name}.") for name in INCIDENTAL)}
