"""What every tool knows of a run folder: what was run, how far it got, what came out. Nothing here needs PyTorch."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from distillers.spot_adaptive.selection import SELECTIONS
from utils.config.changes import deciding_settings
from utils.config.names import model_label, selection_label
from utils.config.yaml_text import read_yaml
from utils.errors import UserError
from utils.files import identity, warn_once
from utils.run_folder.choice import no_choice
from utils.run_folder.layout import CONFIG, Layout, epoch_number
from utils.run_folder.records import Epoch, read_epochs, read_facts, read_file, read_lines, read_result

Status = Literal["finished", "running", "stopped"]

ALONE = "alone"  # the distiller of a run that has none
SINGLE = "single"  # the selection of a run that has none


@dataclass(frozen=True)
class Run:
    """One run folder as it stands now.

    Attributes:
        path: the folder.
        config: as written by the run, plain dicts.
        dataset: the label that groups runs; `dataset_name` is what the data set is, `data` where it lies.
        student: the network that is trained.
        teacher: its name, empty for a network alone; `teacher_weights` is its checkpoint, empty if it is the best one
            of the teacher's own run.
        distiller, selection: `ALONE` and `SINGLE` for a network alone.
        epochs: how many the config asks for.
        settings: what decides the outcome, flat: ``{"training.lr": 0.05, ...}``.
        records: the epochs of the training proper, in order.
        status: ``running`` while a process holds the folder; ``finished`` if every epoch of the config is done.
        result: what the run wrote at its end, see `read_result`; None before.
        facts: what the run wrote at its beginning, see `read_facts`.
    """

    path: Path
    config: dict[str, Any]
    dataset: str
    dataset_name: str
    data: str
    student: str
    teacher: str
    teacher_weights: str
    distiller: str
    selection: str
    seed: int
    epochs: int
    settings: dict[str, Any]
    records: list[Epoch]
    status: Status
    result: dict[str, float] | None
    facts: dict[str, Any]

    @property
    def is_single(self) -> bool:
        return self.selection == SINGLE

    @property
    def has_policy(self) -> bool:
        return not self.is_single and SELECTIONS[self.selection].policy

    @property
    def policy(self) -> str:
        """Its name; empty where the selection has none."""
        return str(self.settings.get("kd.policy", "gumbel")) if self.has_policy else ""

    @property
    def is_finished(self) -> bool:
        return self.status == "finished"

    @property
    def pair(self) -> str:
        """``"vgg13 → vgg8"``, or the network alone."""
        return self.student if self.is_single else f"{self.teacher} → {self.student}"

    @property
    def title(self) -> str:
        what = ALONE if self.is_single else f"{self.distiller}, {selection_label(self.selection, self.policy)}"
        return f"{self.pair}, {what}, seed {self.seed}"

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
        return float(self.curve("val.top1").iloc[-1]) if self.records else None

    @property
    def best_top1(self) -> float | None:
        """The best validation accuracy so far, percent."""
        return float(self.curve("val.top1").max()) if self.records else None

    @property
    def teacher_top1(self) -> float | None:
        """Validation accuracy of the teacher's checkpoint, known once the run is finished."""
        return (self.result or {}).get("teacher_top1")

    @property
    def test_top1(self) -> float | None:
        """Accuracy of the best epoch on the test split, if the data has one, known once the run is finished."""
        return (self.result or {}).get("test_top1")

    @property
    def seconds(self) -> float:
        """Spent on the recorded epochs."""
        return sum(record["seconds"] for record in self.records)

    @cached_property
    def history(self) -> pd.DataFrame:
        """The records as a table: a row per epoch, columns such as ``val.top1`` and ``train.loss/ce``."""
        return pd.json_normalize(self.records).set_index("epoch", drop=False)

    def curve(self, name: str) -> pd.Series:
        """A column of `history` over the epochs, NaN where it is missing."""
        return self.history.get(name, pd.Series(float("nan"), self.history.index))

    @property
    def gate_labels(self) -> list[str]:
        """Names of the gates, the logits' last."""
        names = self.records[-1]["train"] if self.records else {}
        return [name.removeprefix("gate/") for name in names if name.startswith("gate/")]

    @cached_property
    def no_choice(self) -> str | None:
        """What the policy does if it treats all samples alike by now."""
        return no_choice(self.selection, self.records)

    def gate_shares(self) -> pd.DataFrame | None:
        """Share of each class's samples distilled at each spot in the last epoch so far; None if nothing is recorded.

        A row for each class, NaN for one not seen, and a column for each gate, the logits' last. ``attrs["epoch"]``
        counts phases together.
        """
        return next(reversed(read_lines(Layout(self.path).gates, _gate_shares)), None)

    def gate_samples(self) -> pd.DataFrame | None:
        """In which part of the epochs each sample was distilled at each spot; None if nothing is recorded.

        A row for each training sample, a column for each gate. ``attrs["epochs"]`` is how many epochs were counted.
        """
        files = [file for file in Layout(self.path).gate_samples.glob("*.npz") if epoch_number(file) is not None]
        found = (read_file(file, _gate_samples) for file in sorted(files, key=epoch_number, reverse=True))
        return next((samples for samples in found if samples is not None), None)


def _gate_shares(line: bytes) -> pd.DataFrame:
    record = json.loads(line)
    shares = pd.DataFrame(record["classes"], columns=record["gates"], dtype=float)
    shares.attrs["epoch"] = int(record["global_epoch"])
    return shares


def _gate_samples(file: Path) -> pd.DataFrame:
    """See `utils.training.gate_counts.GateRecorder.end_epoch` for what the file holds."""
    with np.load(file) as content:
        distilled, seen, labels = (content[name] for name in ("distilled", "seen", "labels"))
    samples = pd.DataFrame(distilled / np.maximum(seen, 1)[:, None], columns=labels.tolist())
    samples.attrs["epochs"] = int(seen.max())
    return samples


def find_runs(paths: Iterable[Path]) -> list[Run]:
    """Every run in or below the folders, links followed, sorted by data set, pair, distiller, selection, seed and path.

    Raises:
        UserError: there is no run, or one of the folders is missing.
    """
    paths = list(paths)
    if missing := [str(path) for path in paths if not path.is_dir()]:
        raise UserError(f"{', '.join(missing)}: no such folder")
    folders = dict.fromkeys(folder for path in paths for folder in _folders_with_config(path))
    runs = [run for run in map(read_run, folders) if run is not None]
    if not runs:
        raise UserError(f"{', '.join(map(str, paths))}: holds no run (a folder with {CONFIG})")
    runs.sort(key=lambda run: (run.dataset, run.is_single, run.pair, run.distiller, run.selection, run.seed, run.path))
    return runs


def _folders_with_config(root: Path) -> Iterator[Path]:
    """Each real folder once, however many links lead to it."""
    seen = set()
    for name, folders, files in os.walk(
        root, followlinks=True, onerror=lambda e: warn_once(f"{e.filename}: {e.strerror}")
    ):
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
    known = read_file(layout.config, lambda file: _identity(read_yaml(file)))
    if known is None:
        return None
    records, result = read_epochs(layout.metrics, "train"), read_result(layout.result)
    # A finished run may have been resumed with more epochs; its old result does not mean that it is finished.
    done = result is not None and bool(records) and records[-1]["epoch"] >= known["epochs"]
    status: Status = "running" if is_locked(layout) else "finished" if done else "stopped"
    return Run(path, **known, records=records, status=status, result=result, facts=read_facts(layout.facts))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    """What a config says of its run. Raises whatever it likes where these are not the settings of a run."""
    data, training, kd = config["dataset"], config["training"], config.get("kd")
    known = {
        "config": config,
        "dataset": str(data.get("label") or data["name"]),
        "dataset_name": str(data["name"]),
        "data": str(data["root"]),
        "seed": int(training["seed"]),
        "epochs": int(training["epochs"]),
        "settings": deciding_settings(config),
    }
    if kd is None:
        alone = {"teacher": "", "teacher_weights": "", "distiller": ALONE, "selection": SINGLE}
        return known | alone | {"student": _title(config["model"])}
    if kd["selection"] not in SELECTIONS:
        raise ValueError(f"unknown selection {kd['selection']}")
    return known | {
        "student": _title(kd["student"]),
        "teacher": _title(kd["teacher"]),
        "teacher_weights": str(kd["teacher"].get("checkpoint") or ""),
        "distiller": str(config["kd_loss"]["name"]),
        "selection": kd["selection"],
    }


def _title(network: dict[str, Any]) -> str:
    return model_label(str(network["name"]), network.get("kwargs"), network.get("label"))


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
