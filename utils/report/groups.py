"""Which runs are comparable: those that share everything except their seed and selection."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from os.path import normpath
from pathlib import Path
from typing import Any

import pandas as pd

from utils.config.changes import OF_A_POLICY
from utils.registry import fold
from utils.report.statistics import Difference, paired_difference
from utils.run_folder.layout import Layout
from utils.run_folder.read import SINGLE, Run

TEACHER = "teacher"  # a column beside those of the selections
OWN_COLUMN = ["training.seed", "kd.selection"]  # settings in which the runs of one group differ
# Named wherever they are not as usual: what a row does must not depend on what it stands beside.
ALWAYS_NAMED = {"kd.balance": None, "kd.policy": "gumbel"}
RECIPE = ("dataset.", "training.", "pretrain.")  # what runs of different networks and distillers may have in common
_SAME_EVERYWHERE = set(map(fold, ("digits", "cifar-10", "cifar-100", "tiny-imagenet", "imagenet")))  # wherever it lies
_PUBLISHED = Path(__file__).with_name("published.csv")  # validation top-1 of the SAKD paper


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing except their seed and selection: a row of a table, or a panel of a figure.

    Attributes:
        runs: in the order in which they were found.
        settings: those in which they differ from the other runs of the data set, ``"training.epochs=12"``.
        others: runs of other groups that these are compared with. The student's own trainings, of the same length, on
            the same data, with the recipe that is closest; none if two recipes are equally close. And, where the group
            has settings of a policy, the runs without a policy that have the same settings apart from these.
    """

    runs: list[Run]
    settings: str
    others: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.first.pair, self.first.distiller, self.settings)))

    def of(self, selection: str) -> list[Run]:
        """The runs with a selection; `SINGLE` for the student alone."""
        return [run for run in (*self.others, *self.runs) if run.selection == selection]

    @cached_property
    def finished(self) -> pd.DataFrame:
        """The finished runs by seed: ``selection``, and ``last``, ``best``, ``test`` and ``teacher``, accuracies.

        Of several runs of a seed the last one counts.
        """
        runs = [run for run in (*self.others, *self.runs) if run.is_finished]
        rows = [(r.selection, r.seed, r.last_top1, r.best_top1, r.test_top1, r.teacher_top1) for r in runs]
        table = pd.DataFrame(rows, columns=["selection", "seed", "last", "best", "test", TEACHER])
        return table.drop_duplicates(["selection", "seed"], keep="last").set_index("seed")

    def top1(self, selection: str, measure: str = "last") -> pd.Series:
        """Accuracy of the finished runs by seed, percent.

        Args:
            selection: or `SINGLE`, or `TEACHER`: what these runs measured of their teacher, though not on a test split.
            measure: ``last`` or ``best`` epoch, or ``test``: the best epoch on the test split, where there is one.
        """
        if selection == TEACHER:
            values = self.finished[TEACHER].astype(float).dropna()
            return values[~values.index.duplicated(keep="last")] if measure != "test" else values[:0]
        values = self.finished.loc[self.finished["selection"] == selection, measure].astype(float)
        # A run without a test accuracy is older, or of data without that split.
        return values.dropna() if measure == "test" else values

    def difference(self, ours: str, base: str, measure: str = "last") -> Difference | None:
        """One selection minus another one, over the seeds that have both."""
        return paired_difference(self.top1(ours, measure), self.top1(base, measure))

    def gap_closed(self, selection: str, measure: str = "last") -> float | None:
        """Share of the gap between the student alone and the teacher, in percent, of the means over the seeds.

        None or NaN if that is not known.
        """
        top1, single, teacher = (self.top1(name, measure).mean() for name in (selection, SINGLE, TEACHER))
        return 100 * (top1 - single) / (teacher - single) if teacher > single else None

    @cached_property
    def published(self) -> dict[str, float]:
        """The paper's figures in percent, for `TEACHER`, `SINGLE`, ``fixed`` and ``adaptive``; those that it has."""
        run = self.first
        pair = (fold(run.dataset_name), run.teacher, run.student)  # models may differ by case alone; methods do not
        places = {TEACHER: ("t", "standard"), SINGLE: ("s", "standard")}
        places |= {"fixed": (fold(run.distiller), "standard"), "adaptive": (fold(run.distiller), "adaptive")}
        figures = {name: _published()[column].get((*pair, method)) for name, (method, column) in places.items()}
        return {name: float(figure) for name, figure in figures.items() if pd.notna(figure)}


def grouped(runs: Iterable[Run]) -> list[Group]:
    """Runs by data set, pair, distiller and settings, in the order of `runs`. Networks alone are groups as well."""
    runs, groups = list(runs), []
    # What one run found by itself another one of its seed may name.
    found = {(run.seed, _usual_teacher(run)) for run in runs if not run.teacher_weights}
    runs = [
        replace(run, teacher_weights="") if (run.seed, normpath(run.teacher_weights)) in found else run for run in runs
    ]
    for of_dataset in _by(runs, lambda run: run.dataset).values():
        for _, members in sorted(_by(of_dataset, lambda run: run.is_single).items()):
            recipe = [key for key in differing(members) if key.startswith(RECIPE)]
            for named in _by(members, lambda run: (run.pair, run.distiller)).values():
                usual = ALWAYS_NAMED.items()
                unusual = {key for key, value in usual for run in named if run.settings.get(key, value) != value}
                keys = {*recipe, *differing(named), *unusual}
                rows = _by(named, partial(_settings, keys=keys))
                # First those with plain runs, which are then named by the settings that they use.
                for settings, alike in sorted(rows.items(), key=lambda row: all(run.has_policy for run in row[1])):
                    plain = _settings(alike[0], keys - OF_A_POLICY)
                    others = rows.get(plain, []) if alike[0].has_policy and settings != plain else []
                    groups.append(Group(alike, settings, [*_alone(alike[0], of_dataset), *others]))
    return groups


def _usual_teacher(run: Run) -> str:
    """Where it looks for its teacher if its config names no file."""
    root = run.config.get("run", {}).get("root", "")
    return normpath(Layout(Path(root, run.dataset, str(run.seed), run.teacher)).best)


def _by(runs: Iterable[Run], key: Callable[[Run], Hashable]) -> dict[Any, list[Run]]:
    found: dict[Any, list[Run]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


def _settings(run: Run, keys: set[str]) -> str:
    known = comparable(run)
    used = sorted(keys if run.has_policy else keys - OF_A_POLICY)
    return " ".join(f"{key}={known[key]}" for key in used if known.get(key) not in (None, {}))


def differing(runs: Sequence[Run]) -> list[str]:
    """Keys that have several values. A key that some config lacks does not count: it is older than the key."""
    table = pd.DataFrame([{key: repr(value) for key, value in comparable(run).items()} for run in runs])
    table = table.dropna(axis="columns").drop(columns=OWN_COLUMN, errors="ignore")
    return list(table.columns[table.nunique() > 1])


def comparable(run: Run) -> dict[str, Any]:
    """What decides the result of a run, its data and its teacher's weights included."""
    settings = dict(run.settings)
    if fold(run.dataset_name) not in _SAME_EVERYWHERE:
        settings["dataset.root"] = normpath(run.data)
    if not run.is_single:
        # Its checkpoint, e.g. run/teacher-all/epoch-24; empty for that of its own training. What every such path has is
        # left out: data set, network, and seed, because each seed may have a teacher of its own.
        path, usual = Path(run.teacher_weights), {run.dataset, run.teacher, "ckpt", "best"}
        parts = [part for part in (*path.parts[:-1], path.stem) if part not in usual and not part.isdigit()]
        settings["teacher"] = "/".join(parts)
    return settings


def _alone(run: Run, runs: Iterable[Run]) -> list[Run]:
    if run.is_single:
        return []
    wanted = (run.student, run.epochs)
    found = [one for one in runs if one.is_single and (one.student, one.epochs) == wanted and _same_data(one, run)]
    recipes = _by(found, lambda one: len(other_recipe(one, run)))  # by the number of keys in which they differ
    nearest = recipes[min(recipes)] if recipes else []
    return nearest if not any(other_recipe(nearest[0], one) for one in nearest) else []


def other_recipe(one: Run, other: Run) -> list[str]:
    """Keys of ``training.*`` in which two runs differ, apart from the seed and what is of a policy."""
    first, second = comparable(one), comparable(other)
    common = (first.keys() & second.keys()) - OF_A_POLICY - set(OWN_COLUMN)
    return sorted(key for key in common if key.startswith("training.") and first[key] != second[key])


def _same_data(one: Run, other: Run) -> bool:
    """Whether the two know the same images."""
    first, second = ({k: v for k, v in comparable(run).items() if k.startswith("dataset.")} for run in (one, other))
    return all(second[key] == first[key] for key in first.keys() & second.keys())


def replaced(groups: Iterable[Group]) -> list[Run]:
    """Finished runs that are in no table of results, because a later one has their seed and their settings, too."""
    repeated = [
        _by([run for run in group.runs if run.is_finished], lambda run: (run.selection, run.seed)) for group in groups
    ]
    return [run for runs in repeated for same in runs.values() for run in same[:-1]]


@cache
def _published() -> pd.DataFrame:
    table = pd.read_csv(_PUBLISHED)
    table = table.assign(dataset=table["dataset"].map(fold), method=table["method"].map(fold))
    return table.set_index(["dataset", "teacher", "student", "method"])
