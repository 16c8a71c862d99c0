"""From the names that a launcher is given (data set, seed, networks, distiller) to a config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.layers import COMMAND_LINE, Layers
from utils.config.names import model_label, needs_small_lr, network_name, safe_name, same_family
from utils.config.schema import Config
from utils.config.wording import closest, show
from utils.errors import UserError
from utils.registry import fold

SMALL_LR = 0.01


@dataclass(frozen=True)
class Composed:
    """A config that was found or put together, not yet checked.

    Attributes:
        path: the file it was read from; None if it was put together.
        note: one line for the log that says what was taken from where.
        layers: the settings, each with its source for error messages.
    """

    path: Path | None
    note: str
    layers: Layers

    @property
    def data(self) -> dict[str, Any]:
        """The settings as plain nested dicts."""
        return self.layers.data

    def load(self, overrides: Iterable[str] = ()) -> Config:
        """Complete and check it, under ``key=value`` words that win over everything else.

        Raises:
            UserError: one line that names the file, the key, what was found and what would do.
        """
        layers = self.layers.copy()
        layers.add_overrides(overrides)
        return Config.from_dict(layers.data, layers.source)


@dataclass(frozen=True)
class _Experiment:
    """What the launcher asks for: `method` is ``"single"`` or a distiller, the student the network to train."""

    method: str
    student: str
    teacher: str | None = None

    @property
    def file(self) -> Path:
        names = filter(None, (self.teacher, self.student))
        return Path(self.method) / ("-".join(map(model_label, names)) + ".yml")

    def settings(self) -> dict[str, Any]:
        """What its file would say if there were one, by the rules that the published files follow."""
        settings: dict[str, Any] = {"training": {"lr": SMALL_LR}} if needs_small_lr(self.student) else {}
        if self.teacher is None:
            return settings | {"model": {"name": self.student}}
        homo = same_family(self.teacher, self.student)
        return settings | {
            "kd": {"teacher": {"name": self.teacher}, "student": {"name": self.student}},
            "kd_loss": {"name": self.method, "homo": homo},
        }

    def rules(self, homo: bool | None) -> str:
        """The settings that follow from a rule, for the log."""
        small = f", training.lr {SMALL_LR} as is usual for {self.student}" if needs_small_lr(self.student) else ""
        return small if homo is None else f"{small}, homo {str(homo).lower()}"


def find_config(
    dataset: str,
    seed: int,
    *,
    model: str | None = None,
    teacher: str | None = None,
    student: str | None = None,
    distiller: str | None = None,
    root: str | Path = "configs",
) -> Composed:
    """The config of ``model``, or of ``teacher``, ``student`` and ``distiller``.

    It is the file ``<root>/<dataset>/seed-<seed>/<single or distiller>/<names>.yml``; else the same file of another
    seed; else it is composed from ``<root>/base/<single or distiller>.yml`` and ``<root>/<dataset>/base.yml``
    (for distilling ``distill.yml``, where there is one). ``training.seed`` is `seed` in every case.

    Raises:
        UserError: there is no such data set, or names are missing.
    """
    experiment = _experiment(model, teacher, student, distiller)
    folder = _dataset_folder(dataset, Path(root))
    wanted = folder / f"seed-{seed}" / experiment.file
    path = next((path for path in (wanted, *_of_other_seeds(folder, experiment)) if path.is_file()), None)
    if path:
        layers = Layers(str(path))
        layers.add_file(path)
        note = str(path) if path == wanted else f"{path} with training.seed={seed} (there is no {wanted})"
    else:
        layers = Layers(f"{wanted} (composed)")
        parts = _compose(layers, _bases(folder, Path(root), experiment.method), experiment)
        note = f"composed from {parts} (there is no {wanted})"
    layers.add({"training": {"seed": seed}}, COMMAND_LINE)
    return Composed(path, note, layers)


def _compose(layers: Layers, bases: list[Path], experiment: _Experiment) -> str:
    """Lay the bases and what follows from the names into `layers`; what these are, in words."""
    for base in bases:
        layers.add_file(base)
    settings = experiment.settings()
    if "homo" in layers.data.get("kd_loss", {}):  # a data set may settle it for all its pairs
        settings["kd_loss"].pop("homo")
    layers.add(settings, layers.name)
    return " and ".join(map(str, bases)) + experiment.rules(layers.data.get("kd_loss", {}).get("homo"))


def _experiment(model: str | None, teacher: str | None, student: str | None, distiller: str | None) -> _Experiment:
    pair = (teacher, student, distiller)
    for name in filter(None, (model, *pair)):
        try:
            safe_name(name) if name is distiller else network_name(name)
        except ValueError as error:
            raise UserError(f"{COMMAND_LINE}: found {show(name)}, {error}") from None
    if model and not any(pair):
        return _Experiment("single", model)
    if not model and all(pair):
        return _Experiment(distiller.lower(), student, teacher)
    raise UserError(f"{COMMAND_LINE}: give a model to train, or a teacher, a student and a distiller")


def _dataset_folder(dataset: str, root: Path) -> Path:
    known = sorted(path.parent.name for path in root.glob("*/base.yml"))
    for name in known:
        if fold(name) == fold(dataset):
            return root / name
    close = closest(dataset, known)
    hint = f"did you mean {close}? " if close else ""
    there = ", ".join(known) or "none"
    raise UserError(f"{COMMAND_LINE}: no dataset {show(dataset)} in {root}: {hint}those with a base.yml are {there}")


def _of_other_seeds(folder: Path, experiment: _Experiment) -> list[Path]:
    """The same experiment under the published seed first, then under any other."""
    published = folder / "seed-1029" / experiment.file
    return [published, *(seed / experiment.file for seed in sorted(folder.glob("seed-*")))]


def _bases(folder: Path, root: Path, method: str) -> list[Path]:
    candidates = [root / "base" / f"{method}.yml", folder / "base.yml"]
    if method != "single" and (folder / "distill.yml").exists():
        candidates[1] = folder / "distill.yml"  # it names base.yml as its own base
    return [path for path in candidates if path.exists()]
