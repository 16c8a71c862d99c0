"""Tables of results: distiller × pair, one column per selection, over seeds."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from utils.report.published import Published, published
from utils.report.statistics import Difference, Summary, paired_difference, summarise
from utils.run_folder.read import SINGLE, Run

Measure = Literal["last", "best"]
MEASURES: dict[Measure, str] = {"last": "last epoch", "best": "best epoch"}

TEACHER = "teacher"
SELECTIONS = ("fixed", "random", "anti", "adaptive")
COLUMNS = (TEACHER, SINGLE, *SELECTIONS)
OWN_COLUMN = {"training.seed", "kd.selection"}  # settings in which the runs of one row differ


@dataclass
class Cell:
    """What is known of one selection in one row.

    Attributes:
        last, best: accuracy of each finished run by seed, percent.
        unfinished: how far the others are, e.g. ``"running 37/240"``.
    """

    last: dict[int, float] = field(default_factory=dict)
    best: dict[int, float] = field(default_factory=dict)
    unfinished: list[str] = field(default_factory=list)

    def add(self, run: Run) -> None:
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


@dataclass(frozen=True)
class Table:
    """Headings and cells, all text."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Aligned, so that it reads well on a terminal too."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.header))]
        head, *body = (
            "| " + " | ".join(text.replace("|", "\\|").ljust(width) for text, width in zip(line, widths)) + " |"
            for line in lines
        )
        return "\n".join([head, "|" + "|".join("-" * (width + 2) for width in widths) + "|", *body])


def result_rows(runs: Iterable[Run]) -> list[Row]:
    """One row per data set, pair, distiller and setting; in the order of `runs`.

    Runs that differ in more than their seed and selection (e.g. in epochs) do not share a row. Of several runs with
    one seed, a finished one counts, and among those the last in `runs`.
    """
    runs = list(runs)
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        if not run.is_single:
            groups[run.dataset, run.pair, run.distiller].append(run)
    return [row for group in groups.values() for row in _rows_of(group, runs)]


def _rows_of(group: list[Run], runs: list[Run]) -> list[Row]:
    # Only keys that all have: a config written before a key existed says nothing of it.
    common = sorted(set.intersection(*(set(run.settings) for run in group)) - OWN_COLUMN)
    by_settings: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run in group:
        by_settings[tuple(repr(run.settings[key]) for key in common)].append(run)
    differing = [key for key, values in zip(common, zip(*by_settings)) if len(set(values)) > 1]
    return [_row(members, differing, runs) for members in by_settings.values()]


def _row(members: list[Run], differing: list[str], runs: list[Run]) -> Row:
    first = members[0]
    variant = " ".join(f"{key}={first.settings[key]}" for key in differing)
    cells = {column: Cell() for column in COLUMNS}
    for run in members:
        cells[run.selection].add(run)
    for run in runs:
        if run.is_single and run.dataset == first.dataset:
            # A student that was trained for longer, or shorter, is no baseline.
            if run.student == first.student and run.epochs == first.epochs:
                cells[SINGLE].add(run)
            # Its own training says how good a teacher is until a run has measured its checkpoint, which is the best.
            if run.student == first.teacher and run.status == "finished":
                _set_teacher(cells[TEACHER], run.seed, run.best_top1)
    for run in members:
        if run.teacher_top1 is not None:
            _set_teacher(cells[TEACHER], run.seed, run.teacher_top1)
    return Row(first.dataset, first.dataset_name, first.teacher, first.student, first.distiller, variant, cells)


def _set_teacher(cell: Cell, seed: int, top1: float) -> None:
    cell.last[seed] = cell.best[seed] = top1


def result_table(rows: Sequence[Row], measure: Measure) -> Table:
    """Ours, and the published figures (headings with an asterisk) where the rows' data set has any."""
    papers = [row.published for row in rows]
    kinds = [kind for kind in ("teacher", "single", "fixed", "adaptive") if any(getattr(p, kind) for p in papers)]
    header = ["pair", "distiller", *COLUMNS, "adaptive - fixed"]
    if any(row.variant for row in rows):
        header.insert(2, "settings")
    lines = []
    for row, paper in zip(rows, papers):
        line = [row.pair, row.distiller, *(row.cells[column].text(measure) for column in COLUMNS)]
        line.append(_text(row.difference(measure)))
        if "settings" in header:
            line.insert(2, row.variant)
        lines.append(line + [_percent(getattr(paper, kind)) for kind in kinds])
    return Table(header + [f"{kind}*" for kind in kinds], lines)


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
    paper = row.published
    return record | {f"published_{name}": getattr(paper, name) for name in ("teacher", "single", "fixed", "adaptive")}


def run_records(runs: Iterable[Run]) -> list[dict[str, Any]]:
    """One record per run, finished or not, for a CSV file."""
    return [
        {
            "dataset": run.dataset,
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
            "seconds": round(run.seconds, 1),
            "folder": str(run.path),
        }
        for run in runs
    ]


def run_table(runs: Iterable[Run]) -> Table:
    """Every run in a line; accuracies of unfinished ones are those so far."""
    header = ("dataset", "pair", "distiller", "selection", "seed", "status", "epochs", "last %", "best %", "folder")
    return Table(
        header,
        [
            (
                run.dataset, run.pair, run.distiller, run.selection, str(run.seed), run.status,
                f"{run.epochs_done}/{run.epochs}", _percent(run.last_top1), _percent(run.best_top1), str(run.path),
            )
            for run in runs
        ],
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _text(value: object | None) -> str:
    return "" if value is None else str(value)
