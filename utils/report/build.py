"""What a report holds, section by section."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from datasets.folders import enumerate_some
from datasets.source import Source
from utils.errors import UserError
from utils.report.curves import accuracy_figures, cross_entropy_figures, difference_figures
from utils.report.gallery import WAITS_FOR, class_names_of, gallery_figure, matches
from utils.report.gate_plots import class_heatmap, share_figures
from utils.report.losses import loss_figure
from utils.report.page import Section, ShownFigure, ShownTable, address
from utils.report.published import Published
from utils.report.run_table import run_table
from utils.report.settings import common_settings, data_of, replaced
from utils.report.tables import Row, result_rows, result_tables
from utils.run_folder.read import Run

UNFINISHED_NAMED = 5
NO_CHOICE_NAMED = 3

NOTE = (
    "Validation top-1 in percent: mean ± sample standard deviation (number of seeds), of finished runs. The teacher's "
    "figure is that of the checkpoint used. The best epoch was picked on the validation images, which flatters it: "
    "compare by the last one."
)
DIFFERENCE = "The difference pairs runs that share a seed; in brackets its 95 % interval (Student's t)."
GAP = "Gap closed: the share of the way from the student alone to its teacher."
RUNS = (
    "Accuracies of unfinished runs are those so far. Time: of all epochs. Parameters and FLOPs of one image's forward "
    "pass (two for a multiplication and an addition): the student's, then the teacher's, both in millions."
)
PAPER = "* published: Song et al., Spot-adaptive Knowledge Distillation, IEEE TIP 2022."
_LOSSES = (
    "What each term adds to the training loss, its weight included (alpha at the logits, beta at the spots); epoch "
    "means, logarithmic where none is below 0."
)
_CLASSES = "Share of each class's training samples that the policy distilled at each spot in its last epoch, number {}."
_GALLERY = (
    "Training images distilled most and least often at each spot, with their class and the share of recorded epochs in "
    "which they were distilled. Among equals the choice is spread evenly over the data set."
)


def build_sections(
    runs: Sequence[Run], records: Sequence[dict[str, Any]], out: Path, details: int, with_images: bool
) -> Iterator[Section]:
    """The sections in order, each drawn when it is asked for.

    Args:
        records: of the runs, see `run_table.run_records`.
        out: the folder of the page.
        details: of how many runs with a policy to show the heatmap, the losses and the gallery.
        with_images: load the data sets, for class names and galleries.
    """
    for dataset in dict.fromkeys(run.dataset for run in runs):
        of_dataset = [run for run in runs if run.dataset == dataset]
        rows = result_rows(of_dataset)
        if rows:
            yield _results(dataset, rows, of_dataset)
        yield _curves(dataset, of_dataset)
        shares = _shares(dataset, of_dataset)
        if shares.figures:
            yield shares
    yield from _details(runs, out, details, with_images)
    table, same = run_table(runs, records)
    links = {str(run.path): address(run.path, out) for run in runs}
    caption = f"{subtitle(runs)}. {RUNS} {same} A click on a heading sorts."
    yield Section("Runs", tables=[ShownTable(table, caption, sortable=True, links=links)])


def subtitle(runs: Sequence[Run]) -> str:
    counts = [(status, sum(run.status == status for run in runs)) for status in ("finished", "running", "stopped")]
    parts = [f"{count} {status}" for status, count in counts if count]
    plural = "s" if len(runs) > 1 else ""
    return f"{len(runs)} run{plural} ({', '.join(parts)}), {time.strftime('%Y-%m-%d %H:%M')}"


def unfinished(runs: Sequence[Run]) -> str:
    """Names the runs that are not finished; empty if all are."""
    names = [f"{run.title} ({run.progress})" for run in runs if run.status != "finished"]
    if not names:
        return ""
    more = f"; and {len(names) - UNFINISHED_NAMED} more" if len(names) > UNFINISHED_NAMED else ""
    return f"Not finished: {'; '.join(names[:UNFINISHED_NAMED])}{more}."


def notes(rows: Sequence[Row]) -> list[str]:
    """What the tables of results need said."""
    parts = [NOTE]
    if any(row.difference("last") for row in rows):
        parts.append(DIFFERENCE)
    if any(row.gap_closed(column, "last") is not None for row in rows for column in ("fixed", "adaptive")):
        parts.append(GAP)
    return [" ".join(parts), *[PAPER] * any(row.published != Published() for row in rows)]


def setting(runs: Sequence[Run]) -> str:
    """On what the runs of one data set were trained, and how."""
    distilled = [run for run in runs if not run.is_single] or runs
    return " ".join(filter(None, (data_of(runs), common_settings(distilled))))


def not_counted(runs: Sequence[Run]) -> list[str]:
    """A sentence about the finished runs that the tables of results leave out."""
    paths = [str(run.path) for run in replaced(runs)]
    return [f"Left out, since another run has their seed and their settings: {enumerate_some(paths)}."] if paths else []


def without_choice(runs: Sequence[Run]) -> list[str]:
    """A sentence for every run whose policy treats all samples alike by now."""
    found = [f"{run.title}: {run.no_choice}." for run in runs if run.no_choice]
    more = [f"{len(found) - NO_CHOICE_NAMED} more such runs are in the table of all runs, under no choice."]
    return found[:NO_CHOICE_NAMED] + more * (len(found) > NO_CHOICE_NAMED)


def _results(dataset: str, rows: list[Row], runs: Sequence[Run]) -> Section:
    texts = [setting(runs), *not_counted(runs), *without_choice(runs), *notes(rows)]
    section = Section(f"Results on {dataset}", texts=texts)
    section.tables = [ShownTable(table, name.capitalize()) for name, table in result_tables(rows).items()]
    caption = (
        "What adaptivity gains over distilling everywhere, last epoch; right of the line it helps. "
        "An interval that leaves the frame is of two seeds."
    )
    section.figures = _drawn(f"{dataset} difference", caption, difference_figures(rows, "last"))
    return section


def _curves(dataset: str, runs: Sequence[Run]) -> Section:
    accuracy = (
        "Validation accuracy after every epoch, one line per run, all panels on one scale; in runs of 20 epochs and "
        "more it leaves out the steep first quarter."
    )
    entropy = (
        "Cross-entropy, logarithmic; where the pale training line falls away from the validation line, the student "
        "overfits."
    )
    return Section(
        f"Training on {dataset}",
        figures=_drawn(f"{dataset} accuracy", accuracy, accuracy_figures(runs))
        + _drawn(f"{dataset} cross entropy", entropy, cross_entropy_figures(runs)),
    )


def _shares(dataset: str, runs: Sequence[Run]) -> Section:
    caption = (
        "Share of the training samples distilled at each spot in every epoch, one line per run with a policy. "
        "fN: the feature with index N (student-teacher where the two differ); logits: the loss at the logits."
    )
    return Section(
        f"Where {dataset} is distilled, and when",
        figures=_drawn(f"{dataset} gate shares", caption, share_figures(runs)),
    )


def _details(runs: Sequence[Run], out: Path, limit: int, with_images: bool) -> Iterator[Section]:
    chosen = [run for run in runs if run.has_policy and run.records]
    # A seed of every pair and distiller comes before a second seed of any.
    chosen.sort(key=lambda run: (run.status != "finished", run.selection != "adaptive", run.seed))
    for number, run in enumerate(chosen[:limit], 1):
        section = Section(
            f"{run.dataset}: {run.title}",
            texts=without_choice([run]) + _gallery_missing(run, with_images),
            figures=list(_detail_figures(f"run {number:03}", run, with_images)),
            detail=True,
            folder=(str(run.path), address(run.path, out)),
        )
        if number == limit < len(chosen):
            section.texts.append(
                f"{len(chosen) - limit} further runs with a policy are left out; --details N shows more."
            )
        yield section


def _detail_figures(name: str, run: Run, with_images: bool) -> Iterator[ShownFigure]:
    yield ShownFigure.draw(f"{name} {run.title} losses", _LOSSES, loss_figure(run))
    source = load_source(run) if with_images else None
    gates = run.gate_shares()
    if gates is not None:
        names = class_names_of(source, len(gates.shares))
        figure = class_heatmap(gates, names, run.title)
        yield ShownFigure.draw(f"{name} {run.title} classes", _CLASSES.format(gates.epoch), figure)
    samples = run.gate_samples()
    if samples is None or samples.epochs < WAITS_FOR or source is None or not matches(samples, source):
        return
    figure = gallery_figure(samples, source, run.title)
    yield ShownFigure.draw(f"{name} {run.title} gallery", _GALLERY, figure, photographs=True)


def _gallery_missing(run: Run, with_images: bool) -> list[str]:
    """Why there is no gallery, where one could be expected."""
    samples = run.gate_samples()
    if samples is None:
        return []
    shown = "The images distilled most and least often are"
    if samples.epochs < WAITS_FOR:
        return [f"{shown} shown after {WAITS_FOR} epochs; so far {samples.epochs}."]
    if not with_images or ((source := load_source(run)) is not None and matches(samples, source)):
        return []
    root = run.config["dataset"]["root"]
    return [
        f"{shown} not shown: {root} does not hold exactly the {len(samples.frequency):,} images of this run; "
        "skipped ones, and what came or went since, count."
    ]


def load_source(run: Run) -> Source | None:
    """The run's data set, or None where it is not at hand."""
    data = run.config["dataset"]
    return _load_source(run.dataset_name, data["root"], data.get("val_split"))


@lru_cache(maxsize=1)  # runs come data set by data set, and one may fill the memory
def _load_source(name: str, root: str, val_split: float | None) -> Source | None:
    from datasets.build import find_source  # brings PyTorch, which a report without images does not need
    from datasets.download import without_downloads

    try:
        with without_downloads():
            return find_source(name, root, val_split)
    except UserError:
        return None


def _drawn(name: str, caption: str, figures: Iterator[Figure]) -> list[ShownFigure]:
    return [ShownFigure.draw(f"{name} {number}", caption, figure) for number, figure in enumerate(figures, 1)]
