"""Every run in a line: what it was, how far it got, what it cost, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from tqdm import tqdm

from utils.config import Config
from utils.config.related import own_command
from utils.errors import UserError
from utils.report.settings import alone, comparable
from utils.report.table import Table
from utils.report.tables import gap_closed, percent, share
from utils.run_folder.layout import Layout
from utils.run_folder.read import Run

MAY_BE_CAPTION = ("dataset", "data", "status", "epochs", "lr", "batch")


def run_records(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """One record per run, finished or not, for a CSV file; None where nothing is known."""
    return [_record(run, runs) for run in runs]


def _record(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    facts = run.facts or {}
    return {
        "dataset": run.dataset,
        "data": comparable(run).get("dataset.root", run.config["dataset"].get("root")),
        "teacher": run.teacher,
        "student": run.student,
        "distiller": run.distiller,
        "selection": run.selection,
        "seed": run.seed,
        "status": run.status,
        "epochs_done": run.epochs_done,
        "epochs": run.epochs,
        "last_top1": run.last_top1,
        "best_top1": run.best_top1,
        "teacher_top1": run.teacher_top1,
        "gap_closed": gap_closed_by(run, runs),
        "no_choice": str(run.no_choice or ""),
        "lr": run.settings.get("training.lr"),
        "batch_size": run.settings.get("training.batch_size"),
        "seconds": round(run.seconds, 1),
        "parameters": facts.get("parameters"),
        "flops": facts.get("flops"),
        "teacher_parameters": facts.get("teacher_parameters"),
        "teacher_flops": facts.get("teacher_flops"),
        "device": facts.get("device"),
        "folder": str(run.path),
        "command": command_of(run),
    }


def gap_closed_by(run: Run, runs: Sequence[Run]) -> float | None:
    """Share of the gap to the teacher that a finished run closed, in percent, see `tables.gap_closed`.

    The student alone is that of the same seed; where there is none, the mean of those of other seeds.
    """
    if run.status != "finished":
        return None
    accuracies = {one.seed: one.last_top1 for one in alone(run, runs) if one.status == "finished"}
    if not accuracies:
        return None
    return gap_closed(run.last_top1, accuracies.get(run.seed, fmean(accuracies.values())), run.teacher_top1)


def command_of(run: Run) -> str:
    """The command that makes the run: the launcher's, or for configs and data of one's own its config file."""
    try:
        command = own_command(Config.from_dict(run.config))
    except UserError:  # the config is of another version
        command = None
    script = "train_single.py" if run.is_single else "train.py"
    return command or f"python {script} --config {shlex.quote(str(Layout(run.path).config))}"


def run_table(runs: Sequence[Run], records: Sequence[dict[str, Any]]) -> tuple[Table, str]:
    """The table, and in words what is the same for all runs and so has no column.

    Args:
        records: those of `runs`, see `run_records`. Accuracies of unfinished runs are those so far.
    """
    lines = [_line(run, record) for run, record in zip(runs, records)]
    same = {name for name in MAY_BE_CAPTION if len(lines) > 1 and len({line[name] for line in lines}) == 1}
    words = [f"{name} {lines[0][name]}" for name in MAY_BE_CAPTION if name in same and lines[0][name]]
    table = Table.of([{name: cell for name, cell in line.items() if name not in same} for line in lines])
    return table, f"The same for all: {', '.join(words)}." if words else ""


def _line(run: Run, record: dict[str, Any]) -> dict[str, str]:
    return {
        "dataset": run.dataset,
        "pair": run.pair,
        "distiller": run.distiller,
        "selection": run.selection,
        "seed": str(run.seed),
        "status": run.status,
        "epochs": f"{run.epochs_done}/{run.epochs}",
        "last %": percent(run.last_top1),
        "best %": percent(run.best_top1),
        "gap closed": share(record["gap_closed"]),
        "no choice": run.no_choice.short if run.no_choice else "",
        "lr": _plain(record["lr"]),
        "batch": _plain(record["batch_size"]),
        "time": tqdm.format_interval(run.seconds) if run.records else "",
        "parameters (M)": _in_millions(record["parameters"]),
        "MFLOPs": _in_millions(record["flops"]),
        "teacher's": " / ".join(
            filter(None, (_in_millions(record["teacher_parameters"]), _in_millions(record["teacher_flops"])))
        ),
        "data": str(record["data"]),
        "folder": str(run.path),
        "command": record["command"],
    }


def _plain(value: object | None) -> str:
    return "" if value is None else str(value)


def _in_millions(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:,.2f}"
