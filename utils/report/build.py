"""What a report holds, section by section."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from datasets.source import Source
from utils.errors import UserError, doing, enumerate_some
from utils.files import warn_once
from utils.report.curves import (
    accuracy_figure,
    accuracy_limits,
    choosing,
    cross_entropy_figure,
    loss_figure,
    share_figure,
    with_epochs,
)
from utils.report.gain import answer, best_run, tradeoff_figure
from utils.report.gallery import gallery_figure, mistakes_figure
from utils.report.groups import Group, other_recipe, replaced
from utils.report.heatmaps import class_heatmap, confusion_figure
from utils.report.page import Section, ShownFigure, address, slug
from utils.report.style import png
from utils.report.tables import TEST, result_tables, run_table
from utils.run_folder.read import SINGLE, Run

MISTAKES = 16
DETAILS = 12  # runs
PANELS, GRID_ROWS = 12, 8  # in one figure
WAITS_FOR = 10  # epochs; before, most shares are equal by chance

NOTE = (
    "Validation top-1 in percent: mean ± sample standard deviation (number of seeds) of the finished runs. The "
    "teacher's figure is that of the checkpoint used. The best epoch was chosen on the images that it is measured on, "
    "so it looks better than it is: compare by the last epoch. A difference pairs runs with the same seed; in brackets "
    "its 95 % interval (Student's t). Gap closed: the share of the way from the student alone to its teacher."
)
PAPER = "* published: Song et al., Spot-adaptive Knowledge Distillation, IEEE TIP 2022."
# Every report.md holds these words, by which the next report knows that it may replace it.
RUNS = (
    "Accuracies of unfinished runs are those so far. Time: of all epochs. Parameters and FLOPs of one image's forward "
    "pass (two for a multiplication and an addition): the student's, then the teacher's, both in millions."
)
COST = (
    "Accuracy after the last epoch against the cost of the network, mean and standard deviation over the seeds. "
    "python -m utils.evaluate measures latencies; without them, the cost is in FLOPs."
)
ACCURACY = (
    "Validation accuracy after every epoch, one line for each run, all panels on one scale without the steep start."
)
ENTROPY = (
    "Cross-entropy, logarithmic. Where the pale training line falls away from the validation line, the student "
    "overfits."
)
SHARES = (
    "Share of the training samples distilled at each spot in every epoch, one line for each run with a policy. fN: the "
    "feature with index N (student-teacher where the two differ); logits: the loss at the logits."
)
LOSSES = (
    "What each term adds to the training loss, its weight included (alpha at the logits, beta at the spots); epoch "
    "means, logarithmic where none is below 0."
)
CLASSES = "Share of each class's training samples that were distilled at each spot in the last epoch, number {}."
CONFUSION = "Images of each true class (row) by the class that the best student predicts (column)."
COUNTS = "How many validation images each class has, and for how many the best student predicts it."
ERRORS = "The validation images of which the best student is most certain, and wrong: true class → predicted class."
GALLERY = (
    "Training images distilled most and least often at each spot, with their class and the share of recorded epochs in "
    "which they were distilled. Among equals the choice is spread evenly over the data set."
)
DATA = (
    "{train_images:,} images to train on, {val_images:,} to validate, {classes} classes, "
    "{image_size[0]}x{image_size[1]} pixels; "
)


def heading(runs: Sequence[Run]) -> list[str]:
    """How many runs there are, when this was written, and which runs are not finished."""
    counts = [(status, sum(run.status == status for run in runs)) for status in ("finished", "running", "stopped")]
    parts = ", ".join(f"{count} {status}" for status, count in counts if count)
    names = [f"{run.title} ({run.progress})" for run in runs if not run.is_finished]
    lines = [f"{len(runs)} run{'s' * (len(runs) > 1)} ({parts}), {time.strftime('%Y-%m-%d %H:%M')}"]
    return lines + [f"Not finished: {enumerate_some(names)}."] * bool(names)


def result_section(dataset: str, groups: Sequence[Group]) -> Section:
    """Tables of results on one data set, and what has to be said about them."""
    runs, rows = [run for group in groups for run in group.runs], distilled(groups)
    section = Section(f"Results on {dataset}", [data_of(runs)], lead=answer(rows))
    if not rows:
        return section
    section.tables = {
        f"{'Top-1' if name == TEST else 'Validation top-1'} (%), {name}": table
        for name, table in result_tables(rows).items()
    }
    section.texts += [*not_counted(rows), *other_recipes(rows), NOTE]
    section.texts += [PAPER] * any(name.endswith("*") for table in section.tables.values() for name in table)
    return section


def run_section(groups: Sequence[Group], records: pd.DataFrame, out: Path) -> Section:
    """The table of all runs."""
    paths = [run.path for group in groups for run in group.runs]
    links = {str(path): address(path, out) for path in paths}
    return Section("Runs", [RUNS], {"All runs": run_table(records)}, links=links)


def cost_figures(dataset: str, groups: Sequence[Group]) -> list[ShownFigure]:
    """What students on one data set cost, and their accuracy."""
    return drawn(f"{dataset} accuracy and cost", COST, tradeoff_figure, [distilled(groups)])


def figure_sections(dataset: str, groups: Sequence[Group]) -> list[Section]:
    """Curves and gates of the runs on one data set."""
    begun = [group for group in groups if with_epochs(group.runs)]
    accuracy = partial(accuracy_figure, limits=accuracy_limits([run for group in groups for run in group.runs]))
    curves = drawn(f"{dataset} accuracy", ACCURACY, accuracy, chunks(begun, PANELS))
    curves += drawn(f"{dataset} cross entropy", ENTROPY, cross_entropy_figure, chunks(begun, PANELS))
    with_gates = [group for group in groups if choosing(group.runs)]
    shares = drawn(f"{dataset} gate shares", SHARES, share_figure, chunks(with_gates, GRID_ROWS))
    sections = [
        Section(f"Training on {dataset}", figures=curves),
        Section(f"Where {dataset} is distilled, and when", figures=shares),
    ]
    return [section for section in sections if section.figures]


def detail_sections(runs: Sequence[Run], out: Path, with_images: bool) -> Iterator[Section]:
    """Losses, heatmap and gallery of the first `DETAILS` runs with a policy.

    Args:
        with_images: load the data sets, for class names and galleries.
    """
    chosen = choosing(runs)
    # A seed of every pair and distiller comes before a second seed of any.
    chosen.sort(key=lambda run: (not run.is_finished, run.selection != "adaptive", run.seed))
    for number, run in enumerate(chosen[:DETAILS], 1):
        section = Section(f"{run.dataset}: {run.title}", [str(run.path)], detail=True)
        section.links = {str(run.path): address(run.path, out)}
        name, source = f"run {number:03} {run.title}", load_source(run) if with_images else None
        section.figures = drawn(f"{name} losses", LOSSES, loss_figure, [run])
        if (gates := run.gate_shares()) is not None:
            names = source.class_names if source and len(source.class_names) == len(gates) else None
            heatmap = partial(class_heatmap, class_names=names, title=run.title)
            section.figures += drawn(f"{name} classes", CLASSES.format(gates.attrs["epoch"]), heatmap, [gates])
        _add_gallery(section, run, name, source)
        if number == DETAILS < len(chosen):
            left = len(chosen) - DETAILS
            section.texts.append(f"{left} further runs with a policy are left out; a report of their folders has them.")
        yield section


def _add_gallery(section: Section, run: Run, name: str, source: Source | None) -> None:
    """The gallery, or the reason why it is not there."""
    samples = run.gate_samples()
    if samples is None:
        return
    if (epochs := samples.attrs["epochs"]) < WAITS_FOR:
        text = f"The images distilled most and least often are shown after {WAITS_FOR} epochs; so far {epochs}."
        section.texts.append(text)
    elif source is not None and len(samples) == len(source.train):
        gallery = partial(gallery_figure, source=source, title=run.title)
        section.figures += drawn(f"{name} gallery", GALLERY, gallery, [samples])
    else:
        section.texts.append(
            f"The images distilled most and least often are not shown: {run.data} does not hold exactly the "
            f"{len(samples):,} images of this run; images that were skipped, added or deleted count."
        )


def student_sections(dataset: str, groups: Sequence[Group]) -> list[Section]:
    """What the best student on one data set gets right and wrong, if its checkpoint and its images are at hand."""
    run = best_run(distilled(groups))
    if run is None:
        return []
    from utils.report.student import confusion_of, count_figure, predict, worst  # brings PyTorch

    source = load_source(run)
    try:
        with doing(f"evaluating {run.path}"):
            predictions = predict(run, source) if source else None
    except UserError as error:
        warn_once(f"{error}; its confusions are left out")
        return []
    if predictions is None:
        return []
    known = {"class_names": source.class_names, "title": f"{run.title}, best epoch"}
    confusion, wrong = confusion_of(predictions, len(source.class_names)), worst(predictions, MISTAKES)
    figures = drawn(f"{dataset} confusion", CONFUSION, partial(confusion_figure, **known), [confusion])
    figures += drawn(f"{dataset} class counts", COUNTS, partial(count_figure, **known), [confusion])
    if len(wrong) and np.array_equal(predictions["label"], source.val.labels):
        mistakes = partial(mistakes_figure, split=source.val, **known)
        figures += drawn(f"{dataset} mistakes", ERRORS, mistakes, [wrong])
    return [Section(f"The best student on {dataset}", figures=figures)]


def chunks(items: Sequence, size: int) -> list[Sequence]:
    """`items` in pieces of `size`; the last may be shorter."""
    return [items[start : start + size] for start in range(0, len(items), size)]


def drawn(name: str, caption: str, draw: Callable[[object], Figure | None], pieces: Iterable) -> list[ShownFigure]:
    """What `draw` draws of each of the pieces, as PNG files.

    A figure that cannot be drawn is named and left out: the report is of many runs.
    """
    shown = []
    for number, piece in enumerate(pieces, 1):
        try:
            with doing(f"drawing {name}"):
                if figure := draw(piece):
                    width = round(figure.get_figwidth() * 96)
                    shown.append(ShownFigure(slug(f"{name} {number}"), caption, png(figure), width))
        except UserError as error:
            warn_once(f"{error}; left out")
    return shown


def distilled(groups: Iterable[Group]) -> list[Group]:
    return [group for group in groups if not group.first.is_single]


def not_counted(groups: Sequence[Group]) -> list[str]:
    """A sentence about the finished runs that the tables of results leave out."""
    paths = [str(run.path) for run in replaced(groups)]
    return [f"Left out, since another run has their seed and their settings: {enumerate_some(paths)}."] * bool(paths)


def other_recipes(groups: Sequence[Group]) -> list[str]:
    """A sentence for every group whose student alone was trained in another way."""
    pairs = [(group, one) for group in groups for one in group.of(SINGLE)[:1]]
    found = {group.title: other_recipe(one, group.first) for group, one in pairs}
    return [
        f"The student alone beside {title} was trained with another {', '.join(keys)}."
        for title, keys in found.items()
        if keys
    ]


def data_of(runs: Sequence[Run]) -> str:
    """The data set in a sentence: what the runs wrote down about it."""
    sizes = dict.fromkeys(DATA.format(**run.facts) for run in runs if run.facts)
    roots = dict.fromkeys(run.data for run in runs)
    return f"Data: {'or '.join(sizes)}dataset.root: {', '.join(roots)}."


def load_source(run: Run) -> Source | None:
    """The run's data set, or None where it is not at hand."""
    from datasets.build import SOURCE_KEYS  # brings PyTorch, which a report without images does not need

    given = {key: run.config["dataset"].get(key) for key in SOURCE_KEYS}
    return _load_source(run.dataset_name, run.data, json.dumps(given))


@lru_cache(maxsize=1)  # runs come data set by data set, and one may fill the memory
def _load_source(name: str, root: str, keys: str) -> Source | None:
    from datasets.build import find_source
    from datasets.download import without_downloads

    try:
        with doing(f"reading {root}"), without_downloads():
            return find_source(name, root, **json.loads(keys))
    except UserError:
        return None
