"""Tables of results: distiller × pair, one column per selection, over seeds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.report.published import Published, published
from utils.report.settings import Group, alone, grouped, same_data
from utils.report.statistics import Difference, Summary, paired_difference, summarise
from utils.report.table import Table
from utils.run_folder.read import SINGLE, Run

Measure = Literal["last", "best"]
MEASURES: dict[Measure, str] = {"last": "last epoch", "best": "best epoch"}

TEACHER = "teacher"
SELECTIONS = ("fixed", "random", "anti", "adaptive")
COLUMNS = (TEACHER, SINGLE, *SELECTIONS)


@dataclass
class Cell:
    """What is known of one selection in one row.

    Attributes:
        last, best: accuracy of each finished run by seed, percent.
        unfinished: how far the others are, e.g. ``"running 37/240"``.
        no_choice: where those distil whose policy treats all samples alike by now, ``everywhere`` or ``nowhere``.
    """

    last: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)
    no_choice: list[str] = field(default_factory=list)

    def add(self, run: Run) -> None:
        if run.no_choice:
            self.no_choice.append(run.no_choice.where)
        if run.status != "finished":
            self.unfinished.append(run.progress)
            return
        self.last[run.seed], self.best[run.seed] = run.last_top1, run.best_top1

    def values(self, measure: Measure) -> dict[int, float]:
        return getattr(self, measure)

    def text(self, measure: Measure) -> str:
        """``"71.34±0.21 (3)"``, ``"71.34 (1) +1 running"``, ``"running 37/240"``; empty if nothing was run."""
        summary = summarise(self.values(measure).values())
        if summary is None and len(self.unfinished) == 1:
            return self.unfinished[0]
        states = Counter(text.split()[0] for text in self.unfinished)
        more = " ".join(f"+{count} {state}" for state, count in states.items())
        return " ".join(filter(None, [_text(summary), more]))


@dataclass
class Row:
    """One distiller on one pair.

    Attributes:
        variant: the settings in which this row differs from others of the same name, e.g. ``"training.epochs=12"``.
        cells: by column; a column that nothing was run for has an empty cell.
    """

    dataset: str
    dataset_name: str
    teacher: str
    student: str
    distiller: str
    variant: str
    cells: dict[str, Cell]

    @property
    def pair(self) -> str:
        return f"{self.teacher} → {self.student}"

    @property
    def label(self) -> str:
        return ", ".join(filter(None, (self.pair, self.distiller, self.variant)))

    @property
    def published(self) -> Published:
        return published(self.dataset_name, self.teacher, self.student, self.distiller)

    def summary(self, column: str, measure: Measure) -> Summary | None:
        return summarise(self.cells[column].values(measure).values())

    def difference(self, measure: Measure) -> Difference | None:
        """adaptive - fixed, over the seeds that have both."""
        return paired_difference(self.cells["adaptive"].values(measure), self.cells["fixed"].values(measure))

    def gap_closed(self, column: str, measure: Measure) -> float | None:
        """Share of the gap between the student alone and the teacher, in percent, of the means over the seeds."""
        means = (getattr(self.summary(name, measure), "mean", None) for name in (column, SINGLE, TEACHER))
        return gap_closed(*means)

    @property
    def no_choice(self) -> str:
        """``"adaptive: 2 everywhere"``: how many runs do not choose."""
        counts = {name: Counter(cell.no_choice) for name, cell in self.cells.items() if cell.no_choice}
        return "; ".join(f"{name}: {n} {where}" for name, found in counts.items() for where, n in found.items())


def result_rows(runs: Iterable[Run]) -> list[Row]:
    """One row per data set, pair, distiller and setting; in the order of `runs`.

    Runs that differ in more than their seed and selection (e.g. in epochs) do not share a row. Of several runs with
    one seed, a finished one counts, and among those the last in `runs`.
    """
    runs = list(runs)
    return [_row(group, runs) for group in grouped(runs) if not group.first.is_single]


def _row(group: Group, runs: list[Run]) -> Row:
    first = group.first
    cells = {column: Cell() for column in COLUMNS}
    for run in group.runs:
        cells[run.selection].add(run)
    for run in alone(first, runs):
        cells[SINGLE].add(run)
    for run in runs:
        # Its own training says how good a teacher is until a run has measured its checkpoint, which is the best.
        if run.is_single and run.student == first.teacher and run.status == "finished" and same_data(run, first):
            _set_teacher(cells[TEACHER], run.seed, run.best_top1)
    for run in group.runs:
        if run.teacher_top1 is not None:
            _set_teacher(cells[TEACHER], run.seed, run.teacher_top1)
    return Row(first.dataset, first.dataset_name, first.teacher, first.student, first.distiller, group.variant, cells)


def _set_teacher(cell: Cell, seed: int, top1: float) -> None:
    cell.last[seed] = cell.best[seed] = top1


def result_tables(rows: Sequence[Row]) -> dict[str, Table]:
    """The tables of `rows` by what they show: one per measure, or a single one where they would be the same."""
    tables = {name: result_table(rows, measure) for measure, name in MEASURES.items()}
    last, best = tables.values()
    return {"last epoch, which is the best": last} if last == best else tables


def result_table(rows: Sequence[Row], measure: Measure) -> Table:
    """Ours, and the published figures (headings with an asterisk) where the rows' data set has any.

    Columns in which nothing would stand are left out.
    """
    lines = []
    for row in rows:
        paper = row.published
        lines.append(
            {"pair": row.pair, "distiller": row.distiller, "settings": row.variant}
            | {column: row.cells[column].text(measure) for column in COLUMNS}
            | {"adaptive - fixed": _text(row.difference(measure))}
            | {f"gap closed: {column}": share(row.gap_closed(column, measure)) for column in ("fixed", "adaptive")}
            | {"no choice": row.no_choice}
            | {f"{kind}*": percent(getattr(paper, kind)) for kind in ("teacher", SINGLE, "fixed", "adaptive")}
        )
    return Table.of(lines)


def result_records(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The same as numbers for a CSV file, one record per row and measure; None where nothing is known."""
    return [_record(row, measure) for row in rows for measure in MEASURES]


def _record(row: Row, measure: Measure) -> dict[str, Any]:
    record: dict[str, Any] = {
        "dataset": row.dataset,
        "teacher": row.teacher,
        "student": row.student,
        "distiller": row.distiller,
        "settings": row.variant,
        "measure": measure,
    }
    for column in COLUMNS:
        summary = row.summary(column, measure)
        record |= {f"{column}_{name}": getattr(summary, name, None) for name in ("mean", "std", "n")}
    difference = row.difference(measure)
    for name in ("mean", "half_width", "n"):
        record[f"adaptive_minus_fixed_{name}"] = getattr(difference, name, None)
    record |= {f"{column}_gap_closed": row.gap_closed(column, measure) for column in SELECTIONS}
    record["no_choice"] = row.no_choice
    paper = row.published
    return record | {f"published_{name}": getattr(paper, name) for name in ("teacher", "single", "fixed", "adaptive")}


def gap_closed(top1: float | None, single: float | None, teacher: float | None) -> float | None:
    """Which part of the way from the student alone to its teacher was made, in percent; None if that is not known."""
    if top1 is None or single is None or teacher is None or teacher <= single:
        return None
    return 100 * (top1 - single) / (teacher - single)


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} %"


def _text(value: object | None) -> str:
    return "" if value is None else str(value)
