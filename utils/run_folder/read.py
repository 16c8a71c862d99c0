"""What every tool knows of a run folder: what was run, how far it got, what came out. Nothing here needs PyTorch."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from utils.config.changes import deciding_settings
from utils.config.names import model_label
from utils.errors import UserError
from utils.files import identity
from utils.run_folder.choice import NoChoice, no_choice
from utils.run_folder.layout import CONFIG, Layout
from utils.run_folder.records import (
    Epoch,
    Facts,
    Result,
    read_config,
    read_epochs,
    read_facts,
    read_gate_line,
    read_gate_samples,
    read_result,
)

Status = Literal["finished", "running", "stopped"]

ALONE = "alone"  # stands where a distilled run has its distiller
SINGLE = "single"  # stands where a distilled run has its selection


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
        records: the epochs of the training proper, in order.
        status: ``running`` while a process holds the folder; ``finished`` if every epoch of the config is done.
        result: what the run wrote at its end; None before.
        facts: what the run wrote at its beginning; None if it is an older one.
    """

    path: Path
    config: dict[str, Any]
    records: list[Epoch]
    status: Status
    result: Result | None
    facts: Facts | None = None

    @property
    def dataset(self) -> str:
        """The label that groups runs; `dataset_name` is what the data set is."""
        return self.config["dataset"].get("label") or self.dataset_name

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
        return self.result.get("teacher_top1") if self.result else None

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
    def no_choice(self) -> NoChoice | None:
        """What the policy does if it treats all samples alike by now."""
        return no_choice(self.selection, self.records)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What decides the outcome, flat: ``{"training.lr": 0.05, ...}``."""
        return deciding_settings(self.config)

    def gate_shares(self) -> GateShares | None:
        """Those of the last epoch so far; None if nothing is recorded."""
        line = read_gate_line(Layout(self.path).gates)
        return line and GateShares(line["global_epoch"], line["gates"], np.array(line["classes"], dtype=float))

    def gate_samples(self) -> GateSamples | None:
        """Those that were recorded last; None if nothing is."""
        counts = read_gate_samples(Layout(self.path).gate_samples)
        if counts is None:
            return None
        seen = counts["seen"]
        frequency = counts["distilled"] / np.maximum(seen, 1)[:, None]
        return GateSamples(int(seen.max()), counts["labels"].tolist(), frequency)


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, links followed, sorted by data set, pair, distiller, selection, seed and path.

    Raises:
        UserError: a folder does not exist, or there is no run at all.
    """
    folders: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such folder; give run folders, or a folder above them")
        folders |= dict.fromkeys(_folders_with_config(path))
    runs = [run for run in map(read_run, folders) if run is not None]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: holds no run (a folder with {CONFIG})")
    runs.sort(key=lambda run: (run.dataset, run.is_single, run.pair, run.distiller, run.selection, run.seed, run.path))
    return runs


def _folders_with_config(root: Path) -> Iterator[Path]:
    """Each real folder once, however many links lead to it."""
    seen = set()
    for name, folders, files in os.walk(root, followlinks=True):
        if identity(name) in seen:
            folders.clear()
            continue
        seen.add(identity(name))
        if CONFIG in files:
            yield Path(name)


def read_run(path: Path) -> Run | None:
    """The run in `path`; None if there is none, or its settings cannot be read.

    Other files that are damaged count as not there; a warning line names them.
    """
    layout = Layout(path)
    config = read_config(layout.config) if layout.config.exists() else None
    if config is None:
        return None
    records = read_epochs(layout.metrics, "train")
    result = read_result(layout.result)
    # A finished run may have been resumed with more epochs; the old result then says nothing of where it is now.
    done = result is not None and bool(records) and records[-1]["epoch"] >= config["training"]["epochs"]
    status: Status = "running" if is_locked(layout) else "finished" if done else "stopped"
    return Run(path, config, records, status, result, read_facts(layout.facts))


def is_locked(layout: Layout) -> bool:
    """Whether a process writes to the folder right now."""
    try:
        with layout.lock.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # released as the file is closed
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _title(network: dict[str, Any]) -> str:
    return model_label(network["name"], network.get("kwargs"), network.get("label"))
