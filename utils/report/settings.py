"""Which runs are comparable: those that share everything but their seed and selection."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os.path import normpath
from pathlib import Path
from typing import Any

from utils.registry import fold
from utils.run_folder.read import Run

OWN_COLUMN = {"training.seed", "kd.selection"}  # settings in which the runs of one row differ
RECIPE = ("dataset.", "training.", "pretrain.")  # what runs of different networks and distillers may have in common
COMMON = {
    "training.epochs": "{} epochs",
    "training.batch_size": "batches of {}",
    "training.lr": "learning rate {}",
}
_SAME_EVERYWHERE = set(map(fold, ("digits", "cifar-10", "cifar-100", "tiny-imagenet", "imagenet")))  # wherever it lies


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their seed and selection.

    Attributes:
        variant: the settings in which they differ from the other runs of the data set, ``"training.epochs=12"``.
    """

    runs: list[Run]
    variant: str

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.first.pair, self.first.distiller, self.variant)))


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs by data set, pair, distiller and settings, in the order of `runs`."""
    by_kind: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        by_kind[run.dataset, run.is_single].append(run)
    return [group for members in by_kind.values() for group in _grouped(members)]


def replaced(runs: Iterable[Run]) -> list[Run]:
    """Finished runs that are in no table of results, since a later one of `runs` has their seed, too."""
    found = []
    for group in grouped(runs):
        last: dict[tuple[str, int], Run] = {}
        for run in group.runs:
            if run.status == "finished":
                key = run.selection, run.seed
                found += [last[key]] if key in last else []
                last[key] = run
    return found


def _grouped(runs: list[Run]) -> list[Group]:
    recipe = {key for key in _differing(runs) if key.startswith(RECIPE)}
    by_name: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.pair, run.distiller].append(run)
    groups = []
    for members in by_name.values():
        keys = sorted(recipe | _differing(members))
        by_settings: dict[tuple[str, ...], list[Run]] = defaultdict(list)
        for run in members:
            settings = comparable(run)
            by_settings[tuple(f"{key}={settings[key]}" for key in keys)].append(run)
        groups += [Group(same, " ".join(words)) for words, same in by_settings.items()]
    return groups


def _differing(runs: Sequence[Run]) -> set[str]:
    """Keys that have several values. Only keys that all have: a config older than a key says nothing of it."""
    settings = [comparable(run) for run in runs]
    common = set.intersection(*map(set, settings)) - OWN_COLUMN
    return {key for key in common if len({repr(of_run[key]) for of_run in settings}) > 1}


def comparable(run: Run) -> dict[str, Any]:
    """What decides the result of a run, its data and its teacher's weights included."""
    settings = dict(run.settings)
    if fold(run.dataset_name) not in _SAME_EVERYWHERE:
        settings["dataset.root"] = normpath(str(run.config["dataset"].get("root")))
    if not run.is_single:
        settings["teacher"] = _weights_of(run)
    return settings


def _weights_of(run: Run) -> str:
    """The teacher's checkpoint, e.g. ``"run/teacher-all/epoch-24"``; empty for that of its own training.

    What every such path has is left out: data set, network, and seed, because each seed may have a teacher of its own.
    """
    path = Path(run.config["kd"]["teacher"].get("checkpoint") or "")
    usual = {run.dataset, run.teacher, "ckpt"}
    return "/".join(part for part in (*path.parts[:-1], path.stem) if part not in usual and not part.isdigit())


def same_data(one: Run, other: Run) -> bool:
    """Whether the two know the same images."""
    first, second = ({k: v for k, v in comparable(run).items() if k.startswith("dataset.")} for run in (one, other))
    return one.dataset == other.dataset and all(second[key] == first[key] for key in first.keys() & second.keys())


def alone(run: Run, runs: Iterable[Run]) -> list[Run]:
    """The student's own trainings, of the same length, on the same data."""
    if run.is_single:
        return []
    wanted = (run.student, run.epochs)
    return [one for one in runs if one.is_single and (one.student, one.epochs) == wanted and same_data(one, run)]


def common_settings(runs: Sequence[Run]) -> str:
    """``"All runs: 240 epochs, batches of 64, learning rate 0.05"``, as far as it is the same for all."""
    known = []
    for key, words in COMMON.items():
        values = {run.settings.get(key) for run in runs}
        if len(values) == 1 and None not in values:
            text = words.format(*values)
            known.append("1 epoch" if text == "1 epochs" else text)
    if not known:
        return ""
    return f"{'All runs' if len(runs) > 1 else 'The run'}: {', '.join(known)}."


def data_of(runs: Sequence[Run]) -> str:
    """The data set in a sentence, as far as the runs wrote it down."""
    roots = dict.fromkeys(str(run.config["dataset"].get("root")) for run in runs)
    where = f"dataset.root: {', '.join(roots)}."
    sizes = dict.fromkeys(
        f"{facts['train_images']:,} images to train on, {facts['val_images']:,} to validate, "
        f"{facts['classes']} classes, {facts['image_size'][0]}x{facts['image_size'][1]} pixels"
        for facts in (run.facts for run in runs)
        if facts
    )
    return f"Data: {'; or '.join([*sizes])}; {where}" if sizes else f"Data: {where}"
