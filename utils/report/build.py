"""What a report holds, section by section."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from matplotlib.figure import Figure

from datasets.source import Source
from utils.errors import UserError
from utils.report.curves import accuracy_figures, cross_entropy_figures, difference_figures, loss_figure
from utils.report.gallery import class_names_of, gallery_figure, matches
from utils.report.gate_plots import class_heatmap, share_figures
from utils.report.page import Section, ShownFigure, ShownTable
from utils.report.published import Published
from utils.report.tables import MEASURES, Row, result_rows, result_table, run_table
from utils.run_folder.read import Run

UNFINISHED_NAMED = 12

NOTE = (
    "Validation top-1 in percent: mean ± sample standard deviation (number of seeds), of finished runs. The difference "
    "pairs runs that share a seed; in brackets its 95 % interval (Student's t). The teacher's figure is that of the "
    "checkpoint used. The best epoch was picked on the validation images, which flatters it: compare by the last one."
)
PAPER = "* published: Song et al., Spot-adaptive Knowledge Distillation, IEEE TIP 2022."
_CLASSES = "Share of each class's training samples that the policy distilled at each spot in its last epoch, number {}."
_GALLERY = (
    "Training images distilled most and least often at each spot, with their class and the share of recorded epochs in "
    "which they were distilled. Among equals the choice is spread evenly over the data set."
)


def build_sections(runs: Sequence[Run], details: int, with_images: bool) -> Iterator[Section]:
    """The sections in order, each drawn when it is asked for.

    Args:
        details: of how many runs with a policy to show the heatmap, the losses and the gallery.
        with_images: load the data sets, for class names and galleries.
    """
    for dataset in dict.fromkeys(run.dataset for run in runs):
        of_dataset = [run for run in runs if run.dataset == dataset]
        rows = result_rows(of_dataset)
        if rows:
            yield _results(dataset, rows)
        yield _curves(dataset, of_dataset)
        shares = _shares(dataset, of_dataset)
        if shares.figures:
            yield shares
    yield from _details(runs, details, with_images)
    yield Section("Runs", tables=[ShownTable(run_table(runs), _runs_caption(runs), sortable=True)])


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
    return [NOTE, PAPER] if any(row.published != Published() for row in rows) else [NOTE]


def _results(dataset: str, rows: list[Row]) -> Section:
    section = Section(f"Results on {dataset}", texts=notes(rows))
    section.tables = [ShownTable(result_table(rows, measure), name.capitalize()) for measure, name in MEASURES.items()]
    caption = (
        "What adaptivity gains over distilling everywhere, last epoch; right of the line it helps. "
        "An interval that leaves the frame is of two seeds."
    )
    section.figures = _drawn(f"{dataset} difference", caption, difference_figures(rows, "last"))
    return section


def _curves(dataset: str, runs: Sequence[Run]) -> Section:
    accuracy = (
        "Validation accuracy after every epoch, one line per run; in runs of 20 epochs and more "
        "the axis leaves out the steep first quarter."
    )
    entropy = (
        "Cross-entropy, logarithmic; where the training line falls away from the validation line, the student overfits."
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


def _details(runs: Sequence[Run], limit: int, with_images: bool) -> Iterator[Section]:
    chosen = [run for run in runs if run.has_policy and run.records]
    # A seed of every pair and distiller comes before a second seed of any.
    chosen.sort(key=lambda run: (run.status != "finished", run.selection != "adaptive", run.seed))
    for number, run in enumerate(chosen[:limit], 1):
        section = Section(
            f"{run.dataset}: {run.title}", figures=list(_detail_figures(f"run {number:03}", run, with_images))
        )
        if number == limit < len(chosen):
            section.texts.append(
                f"{len(chosen) - limit} further runs with a policy are left out; --details N shows more."
            )
        yield section


def _detail_figures(name: str, run: Run, with_images: bool) -> Iterator[ShownFigure]:
    caption = "Terms of the training loss before their weights, epoch means, logarithmic."
    yield ShownFigure.draw(f"{name} {run.title} losses", caption, loss_figure(run))
    source = load_source(run) if with_images else None
    gates = run.gate_shares()
    if gates is not None:
        names = class_names_of(source, len(gates.shares))
        figure = class_heatmap(gates, names, run.title)
        yield ShownFigure.draw(f"{name} {run.title} classes", _CLASSES.format(gates.epoch), figure)
    samples = run.gate_samples()
    if samples is not None and source is not None and matches(samples, source):
        figure = gallery_figure(samples, source, run.title)
        yield ShownFigure.draw(f"{name} {run.title} gallery", _GALLERY, figure)


def load_source(run: Run) -> Source | None:
    """The run's data set, or None where it is not at hand."""
    return _load_source(run.dataset_name, run.config["dataset"]["root"])


@lru_cache(maxsize=1)  # runs come data set by data set, and one may fill the memory
def _load_source(name: str, root: str) -> Source | None:
    from datasets.download import without_downloads  # bring PyTorch, which a report without images does not need
    from datasets.registry import DATASETS

    try:
        with without_downloads():
            return DATASETS.get(name)(Path(root).expanduser())
    except UserError:
        return None


def _drawn(name: str, caption: str, figures: Iterator[Figure]) -> list[ShownFigure]:
    return [ShownFigure.draw(f"{name} {number}", caption, figure) for number, figure in enumerate(figures, 1)]


def _runs_caption(runs: Sequence[Run]) -> str:
    return subtitle(runs) + ". Accuracies of unfinished runs are those so far. A click on a heading sorts."
