"""Runs that belong together: that of a student's teacher, and what one might run next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.changes import flatten
from utils.config.find import Composed, find_config
from utils.config.schema import Config, ModelConfig
from utils.config.yaml_text import parse_yaml
from utils.errors import UserError
from utils.libraries import weights_key

# What a student and the teacher that is trained for it have in common, besides the seed and the network: the data,
# the place where they write, and how the machine is used.
SHARED_SECTIONS = ("dataset", "run")
SHARED_TRAINING = ("device", "precision", "channels_last", "cuda_graph", "deterministic")


@dataclass(frozen=True)
class SingleRun:
    """A network trained alone.

    Attributes:
        arguments: of `train_single.py`.
        config: what these amount to.
        note: one line that says where the config comes from.
    """

    arguments: tuple[str, ...]
    config: Config
    note: str


def single_run(dataset: str, seed: int, model: str, overrides: Iterable[str]) -> SingleRun:
    """The run of `model` that ``train_single.py`` makes of these arguments; see `find_config` for the errors."""
    overrides = tuple(overrides)
    composed = find_config(dataset, seed, model=model)
    arguments = ("--dataset", dataset, "--seed", str(seed), "--model", model, *overrides)
    return SingleRun(arguments, composed.load(overrides), composed.note)


def teacher_run(config: Config, overrides: Iterable[str] = ()) -> SingleRun:
    """The run that trains the teacher of a student's `config`, where that does not name a checkpoint.

    Args:
        config: of the student.
        overrides: ``key=value`` words for the teacher alone, e.g. ``"training.epochs=10"``.

    Raises:
        UserError: there is no such config, or its result would lie where the student does not look for it.
    """
    words = [*_shared(config, "model", config.kd.teacher), *overrides]
    run = single_run(_folder(config), config.training.seed, config.kd.teacher.name, words)
    wanted = config.teacher_checkpoint.parents[1]
    if run.config.run_dir != wanted:
        raise UserError(
            f"the teacher's arguments put it into {run.config.run_dir}, but the student looks for it in {wanted}; "
            "name, seed, dataset.label and run.root are the student's"
        )
    return run


def own_command(config: Config) -> str | None:
    """The launcher's command that makes the very run of `config`; None for data that the launchers do not know."""
    variables = {"dataset": _folder(config), "seed": config.training.seed}
    try:
        if config.model:
            composed = find_config(**variables, model=config.model.name)
            words = _overrides(composed, config, ())
            return _command(variables | {"model": config.model.name}, "train_single.sh", words)
        kd, distiller = config.kd, config.kd_loss.name
        composed = find_config(**variables, teacher=kd.teacher.name, student=kd.student.name, distiller=distiller)
        variables |= {"net1": kd.teacher.name, "net2": kd.student.name, "distiller": distiller}
        given = () if kd.selection == "adaptive" else (f"kd.selection={kd.selection}",)
        words = _overrides(composed, config, given)
    except UserError:
        return None
    if kd.selection == "anti":
        return _command(variables, "train_anti.sh", words)
    return _command(variables, "train.sh", [*given, *words])


def next_command(config: Config) -> str | None:
    """What one might run after `config`, ready to be pasted; None for data that the launchers do not know.

    After a network alone that is a student of it (train.sh has a default for the student), after adaptive
    distillation the ablation, after the ablation the plain distiller.
    """
    if config.kd:
        selection = "fixed" if config.kd.selection == "anti" else "anti"
        kd = config.kd.model_copy(update={"selection": selection})
        return own_command(config.model_copy(update={"kd": kd}))
    name = config.model.name
    variables = {"dataset": _folder(config), "seed": config.training.seed}
    try:
        composed = find_config(**variables, teacher=name, student=name, distiller="at")
        target = composed.load(_shared(config, "kd.teacher", config.model))
    except UserError:
        return None
    return _command(variables | {"net1": name, "distiller": "at"}, "train.sh", _overrides(composed, target, ()))


def _shared(config: Config, section: str, network: ModelConfig) -> list[str]:
    """Words for what `config` shares with the run of its teacher or student, where `network` stands in `section`."""
    settings = config.to_dict()
    shared = {f"{part}.{key}": value for part in SHARED_SECTIONS for key, value in settings[part].items()}
    shared |= {f"training.{key}": settings["training"][key] for key in SHARED_TRAINING}
    # What is left says how the network is built: its name is given apart, the others are about a checkpoint.
    others = {"name", "checkpoint"} | ({"new_head"} if weights_key(network.name) not in network.kwargs else set())
    built = network.model_dump(mode="json", exclude=others, exclude_defaults=True)
    shared |= {f"{section}.{key}": value for key, value in built.items()}
    return [_word(key, value) for key, value in shared.items() if value is not None]


def _folder(config: Config) -> str:
    """The folder below ``configs/`` whose bases are those of the data."""
    # A label of one's own may stand in a file alone; the bases of the data set itself then serve.
    data = config.dataset
    return data.label if Path("configs", data.label, "base.yml").exists() else data.name


def _overrides(composed: Composed, target: Config, given: tuple[str, ...]) -> list[str]:
    """The fewest words that, besides `given`, make `target` out of `composed`; keys that follow others are left out."""
    before = flatten(composed.load(given).to_dict())
    words = [_word(key, value) for key, value in flatten(target.to_dict()).items() if before.get(key, ...) != value]
    for word in list(words):
        fewer = [other for other in words if other != word]
        if composed.load([*given, *fewer]) == target:
            words = fewer
    return words


def _word(key: str, value: Any) -> str:
    return f"{key}={value}" if _is_plain(value) else f"{key}={json.dumps(value, ensure_ascii=False)}"


def _is_plain(value: Any) -> bool:
    """Whether it is text that can stand without quotation marks."""
    try:
        return isinstance(value, str) and parse_yaml(value) == value
    except UserError:
        return False


def _command(variables: dict[str, Any], script: str, words: Iterable[str]) -> str:
    assignments = [f"{name}={shlex.quote(str(value))}" for name, value in variables.items()]
    return " ".join([*assignments, "sh", script, *(shlex.quote(word) for word in words)])
