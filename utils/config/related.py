"""Runs that belong together: that of a student's teacher, and what helps after a run."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from utils.config.changes import flatten
from utils.config.find import find_config
from utils.config.names import same_family
from utils.config.schema import Config
from utils.config.yaml_text import spell
from utils.errors import UserError
from utils.libraries import weights_key
from utils.run_folder.layout import Layout

# What a student and the teacher that is trained for it have in common, besides the seed and the network: the data,
# the folder that they write to, and how the machine is used.
SHARED_SECTIONS = ("dataset", "run")
SHARED_TRAINING = ("device", "precision", "channels_last", "cuda_graph", "deterministic")


@dataclass(frozen=True)
class Command:
    """How a run was started, ``dataset=digits net1=vgg13 sh train.sh training.epochs=3``. A run remembers it.

    Attributes:
        script: the launcher.
        variables: those that were given, by name.
        words: the options and the ``key=value`` words.
    """

    script: str
    variables: Mapping[str, Any]
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        assignments = [f"{name}={shlex.quote(str(value))}" for name, value in self.variables.items()]
        return " ".join([*assignments, "sh", self.script, *map(shlex.quote, self.words)])

    @property
    def arguments(self) -> tuple[str, ...]:
        """The command's arguments for the entry point in Python, where every variable is an option."""
        options = [word for name, value in self.variables.items() for word in (f"--{name}", str(value))]
        return (*options, *self.words)


@dataclass(frozen=True)
class SingleRun:
    """A network trained alone.

    Attributes:
        command: makes the run.
        config: what it amounts to.
        note: one line that says where the config comes from.
    """

    command: Command
    config: Config
    note: str


def single_run(dataset: str, seed: int, model: str, overrides: Iterable[str]) -> SingleRun:
    """The run of `model` that ``train_single.py`` makes of these arguments; see `find_config` for the errors."""
    overrides = tuple(overrides)
    composed = find_config(dataset, seed, model=model)
    command = Command("train_single.sh", {"dataset": dataset, "seed": seed, "model": model}, overrides)
    return SingleRun(command, composed.load(overrides), composed.note)


def teacher_run(config: Config, overrides: Iterable[str] = ()) -> SingleRun:
    """The run that trains the teacher of a student's `config`, where that does not name a checkpoint.

    Args:
        config: of the student.
        overrides: ``key=value`` words for the teacher alone, e.g. ``"training.epochs=10"``.

    Raises:
        UserError: there is no such config, or its result would lie where the student does not look for it.
    """
    label = config.dataset.label  # which a file may have chosen; the bases of the data set itself then serve
    folder = label if Path("configs", label, "base.yml").exists() else config.dataset.name
    names = (folder, config.training.seed, config.kd.teacher.name)
    usual = flatten(single_run(*names, ()).config.to_dict())  # which no word need say
    settings, network = config.to_dict(), config.kd.teacher
    shared = {f"{part}.{key}": value for part in SHARED_SECTIONS for key, value in settings[part].items()}
    shared |= {f"training.{key}": settings["training"][key] for key in SHARED_TRAINING}
    # How the network is built; its name is given apart, and it is trained without the keys about a checkpoint.
    others = {"name", "checkpoint"} | ({"new_head"} if weights_key(network.name) not in network.kwargs else set())
    built = network.model_dump(mode="json", exclude=others, exclude_defaults=True)
    shared |= {f"model.{key}": value for key, value in built.items()}
    words = [f"{key}={spell(value)}" for key, value in shared.items() if usual.get(key) != value]
    run = single_run(*names, [*words, *overrides])
    wanted = config.teacher_checkpoint.parents[1]
    if run.config.run_dir != wanted:
        raise UserError(
            f"the teacher's arguments put it into {run.config.run_dir}, but the student looks for it in {wanted}; "
            "name, seed, dataset.label and run.root are the student's"
        )
    return run


def remembered(config: Config, command: Command | None = None) -> str:
    """The command that a run remembers and reports quote; of a run that no launcher started, its config file."""
    script = "train_single.py" if config.model else "train.py"
    return str(command or f"python {script} --config {shlex.quote(str(Layout(config.run_dir).config))}")


def next_command(config: Config, command: Command | None) -> str:
    """What helps after a run, ready to be pasted.

    After a network alone, that is the command that distils to or from it, as a published pair does. After a student, it
    is the run to compare with: the plain distiller or the policy. Where both exist, or neither is known, it is the
    report.

    Args:
        config: of the run.
        command: how it was started, if it was by a launcher.
    """
    follow = _distilling if config.model else _for_comparison
    following = follow(config, command) if command else None
    return str(following or f"python -m utils.report {shlex.quote(config.run.root)}")


def _for_comparison(config: Config, command: Command) -> Command | None:
    """The command with the plain distiller, or with the policy if that was plain; None if that run exists, or after the
    ablation."""
    other = {"adaptive": "fixed", "random": "fixed", "fixed": "adaptive"}.get(config.kd.selection)
    kd = config.kd.model_copy(update={"selection": other})
    if other is None or Layout(config.model_copy(update={"kd": kd}).run_dir).result.exists():
        return None
    words = [word for word in command.words if not word.startswith("kd.selection=")]
    return replace(command, words=(*words, f"kd.selection={other}"))


def _distilling(config: Config, command: Command) -> Command | None:
    """Distilling to or from a network that was trained alone by `command`; None if no published pair has it."""
    pair = _published_pair(config.model.name, config.dataset.name)
    if pair is None or "--config" in command.words:
        return None
    role = "kd.teacher" if pair[0] == config.model.name else "kd.student"
    keys = ("training.seed", *(f"training.{key}" for key in SHARED_TRAINING))
    words = []
    for word in command.words:
        section, _, key = word.partition("=")[0].partition(".")
        if section == "model" and key not in ("checkpoint", "new_head"):
            words.append(f"{role}{word.removeprefix('model')}")
        elif section in SHARED_SECTIONS or f"{section}.{key}" in keys:
            words.append(word)
    variables = {key: value for key, value in command.variables.items() if key != "model"}
    return Command("train.sh", variables | {"net1": pair[0], "net2": pair[1]}, tuple(words))


def _published_pair(name: str, dataset: str) -> list[str] | None:
    """Teacher and student of a config that has the network: of the same data set and of one family, if possible."""
    for folder in (dataset, "*"):
        pairs = [path.stem.split("-") for path in sorted(Path("configs").glob(f"{folder}/seed-*/*/*-*.yml"))]
        fitting = [pair for pair in pairs if len(pair) == 2 and name in pair and pair[0] != pair[1]]
        if fitting:
            return min(fitting, key=lambda pair: not same_family(*pair))
    return None
