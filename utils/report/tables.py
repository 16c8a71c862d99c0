"""Tables: results of each pair and distiller over seeds, and every run in a line."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from numbers import Real
from typing import Any

import pandas as pd
from tqdm import tqdm

from utils.report.groups import TEACHER, Group
from utils.report.statistics import mean_text
from utils.run_folder.layout import Layout
from utils.run_folder.read import SELECTIONS, SINGLE, Run

TEST = "test split, best epoch"
MEASURES = {"last": "last epoch", "best": "best epoch", "test": TEST}
COLUMNS = (TEACHER, SINGLE, *SELECTIONS)
IN_PAPER = (TEACHER, SINGLE, "fixed", "adaptive")
COMPARED = ("fixed", "adaptive")
ABLATIONS = tuple(name for name in SELECTIONS if name not in COMPARED)


def result_tables(groups: Sequence[Group]) -> dict[str, pd.DataFrame]:
    """The tables of `groups` by what they show: one for each measure, or a single one where they would be the same."""
    tables = {MEASURES[measure]: result_table(groups, measure) for measure in _measured(groups)}
    last, best = tables[MEASURES["last"]], tables[MEASURES["best"]]
    if last.equals(best):
        del tables[MEASURES["last"]], tables[MEASURES["best"]]
        return {"last epoch, which is the best": last} | tables
    return tables


def _measured(groups: Sequence[Group]) -> list[str]:
    """The test split is a measure if some run has been evaluated on it."""
    tested = any(run.test_top1 is not None for group in groups for run in (*group.runs, *group.others))
    return [measure for measure in MEASURES if tested or measure != "test"]


def result_table(groups: Sequence[Group], measure: str) -> pd.DataFrame:
    """Text, a row for each group; headings with an asterisk have published figures. Empty columns are left out."""
    return without_empty(
        pd.DataFrame(
            {"pair": group.first.pair, "distiller": group.first.distiller}
            | {name: _cell(group, name, measure) for name in COMPARED}
            | {"adaptive - fixed": str(group.difference("adaptive", "fixed", measure) or "")}
            | {f"{name} - single": str(group.difference(name, SINGLE, measure) or "") for name in COMPARED}
            | {name: _cell(group, name, measure) for name in (SINGLE, *ABLATIONS, TEACHER)}
            | {f"gap closed: {name}": share(group.gap_closed(name, measure)) for name in COMPARED}
            | {"no choice": _no_choice(group)}
            | {f"{name}*": percent(group.published.get(name)) for name in IN_PAPER}
            | {"settings": group.settings}
            for group in groups
        )
    )


def _cell(group: Group, column: str, measure: str) -> str:
    """``"71.34±0.21 (3)"``, ``"71.34 (1) +1 running"``, ``"running 37/240"``; empty if nothing was run."""
    unfinished = [run for run in group.of(column) if not run.is_finished]
    text = mean_text(group.top1(column, measure))
    if not text and len(unfinished) == 1:
        return unfinished[0].progress
    more = [f"+{count} {status}" for status, count in Counter(run.status for run in unfinished).items()]
    return " ".join(filter(None, [text, *more]))


def _no_choice(group: Group) -> str:
    """``"adaptive: 2 everywhere"``: how many runs do not choose."""
    counts = Counter((run.selection, run.no_choice.partition(" ")[0]) for run in group.runs if run.no_choice)
    return "; ".join(f"{selection}: {count} {where}" for (selection, where), count in counts.items())


def result_records(groups: Sequence[Group]) -> pd.DataFrame:
    """The same as numbers, a row for each group and measure."""
    return pd.DataFrame(_record(group, measure) for group in groups for measure in _measured(groups))


def _record(group: Group, measure: str) -> dict[str, object]:
    first = group.first
    record = {"dataset": first.dataset, "teacher": first.teacher, "student": first.student}
    record |= {"distiller": first.distiller, "settings": group.settings, "measure": measure}
    for column in COLUMNS:
        values = group.top1(column, measure)
        record |= {f"{column}_mean": values.mean(), f"{column}_std": values.std(), f"{column}_n": len(values) or None}
    for ours, base in (("adaptive", "fixed"), ("fixed", SINGLE), ("adaptive", SINGLE)):
        difference = group.difference(ours, base, measure)
        for name in ("mean", "half_width", "n"):
            record[f"{ours}_minus_{base}_{name}"] = getattr(difference, name, None)
    record |= {f"{column}_gap_closed": group.gap_closed(column, measure) for column in SELECTIONS}
    record["no_choice"] = _no_choice(group)
    return record | {f"published_{name}": group.published.get(name) for name in IN_PAPER}


def run_records(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each run, finished or not."""
    return pd.DataFrame(_run_record(run, group) for group in groups for run in group.runs)


def _run_record(run: Run, group: Group) -> dict[str, object]:
    costs = ("parameters", "flops", "teacher_parameters", "teacher_flops", "device")
    return {
        "dataset": run.dataset,
        "data": run.data,
        "pair": run.pair,
        "teacher": run.teacher,
        "student": run.student,
        "distiller": run.distiller,
        "selection": run.selection,
        "policy": run.policy,
        "seed": run.seed,
        "settings": group.settings,
        "status": run.status,
        "progress": f"{run.epochs_done}/{run.epochs}",
        "epochs_done": run.epochs_done,
        "epochs": run.epochs,
        "last_top1": run.last_top1,
        "best_top1": run.best_top1,
        "class_mean": run.curve("val.class_mean").iloc[-1] if run.records else None,
        "teacher_top1": run.teacher_top1,
        "test_top1": run.test_top1,
        "no_choice": run.no_choice or "",
        "lr": run.settings.get("training.lr"),
        "batch_size": run.settings.get("training.batch_size"),
        "seconds": round(run.seconds, 1),
        **{name: run.facts.get(name) for name in costs},
        "folder": str(run.path),
        "command": command_of(run),
    }


def command_of(run: Run) -> str:
    """The command that made the run; of a run written before commands were remembered, its config file."""
    script = "train_single.py" if run.is_single else "train.py"
    return run.facts.get("command") or f"python {script} --config {shlex.quote(str(Layout(run.path).config))}"


def run_table(records: pd.DataFrame) -> pd.DataFrame:
    """The table of all runs as text.

    Args:
        records: see `run_records`. Accuracies of unfinished runs are those so far.
    """
    return without_empty(pd.DataFrame({head: records[name].map(text) for head, (name, text) in SHOWN.items()}))


def without_empty(table: pd.DataFrame) -> pd.DataFrame:
    """`table` without the columns in which nothing stands."""
    return table.loc[:, (table != "").any()]


def percent(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value:.2f}"


def share(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value:.0f} %"


def _in_millions(value: float | None) -> str:
    return "" if pd.isna(value) else f"{value / 1e6:,.2f}"


def _setting(value: Any) -> str:
    if isinstance(value, Real):
        return "" if pd.isna(value) else f"{value:g}"
    return "" if value is None else str(value)  # a config that was changed by hand


# The columns of the table of all runs: which record each shows, and how.
SHOWN = {
    "dataset": ("dataset", str),
    "pair": ("pair", str),
    "distiller": ("distiller", str),
    "selection": ("selection", str),
    "policy": ("policy", str),
    "seed": ("seed", str),
    "last %": ("last_top1", percent),
    "status": ("status", str),
    "epochs": ("progress", str),
    "best %": ("best_top1", percent),
    "class mean %": ("class_mean", percent),
    "test % (best epoch)": ("test_top1", percent),
    "no choice": ("no_choice", str),
    "settings": ("settings", str),
    "lr": ("lr", _setting),
    "batch": ("batch_size", _setting),
    "time": ("seconds", lambda seconds: tqdm.format_interval(seconds) if seconds else ""),
    "parameters (M)": ("parameters", _in_millions),
    "MFLOPs": ("flops", _in_millions),
    "teacher's parameters (M)": ("teacher_parameters", _in_millions),
    "teacher's MFLOPs": ("teacher_flops", _in_millions),
    "folder": ("folder", str),
    "command": ("command", str),
}
