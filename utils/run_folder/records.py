"""The small files of a run folder, read back: each is of the shape given here, or left out with one warning line."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from pydantic import AfterValidator, Field, FiniteFloat, NonNegativeFloat, PositiveInt, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict

from utils.config.yaml_text import read_yaml
from utils.errors import UserError, reason
from utils.files import check_regular
from utils.run_folder.layout import epoch_number

log = logging.getLogger("sakd")
T = TypeVar("T")


class Epoch(TypedDict):
    """A line of ``metrics.jsonl``: an epoch and the means over its images.

    Attributes:
        phase: ``pretrain``, in which a distiller trains alone, has no validation.
    """

    phase: Literal["pretrain", "train"]
    epoch: PositiveInt
    seconds: NonNegativeFloat
    train: dict[str, FiniteFloat]
    val: NotRequired[dict[str, FiniteFloat]]


class Result(TypedDict):
    """``result.json``: accuracies in percent."""

    best_top1: FiniteFloat
    last_top1: FiniteFloat
    teacher_top1: NotRequired[FiniteFloat]


class Facts(TypedDict):
    """``facts.json``: what is known of a run before its first step. Older runs have none.

    Attributes:
        train_images, val_images: their numbers.
        image_size: height and width.
        parameters, teacher_parameters: of the networks.
        flops, teacher_flops: of one image's forward pass, two for a multiplication and an addition; None if not known.
        weights: of the terms of the loss that have one, and over how many epochs it grows to that.
        device: the machine it was started on last.
    """

    train_images: int
    val_images: int
    classes: int
    image_size: tuple[int, int]
    parameters: int
    flops: int | None
    teacher_parameters: NotRequired[int]
    teacher_flops: NotRequired[int | None]
    weights: dict[str, tuple[FiniteFloat, int]]
    device: str


class GateLine(TypedDict):
    """A line of ``gates.jsonl``: by class, the share of its samples distilled at each gate; None if it has none."""

    global_epoch: int
    gates: Annotated[list[str], Field(min_length=1)]
    classes: Annotated[list[list[FiniteFloat | None]], Field(min_length=1)]


class _Named(TypedDict):
    name: str


class _Network(_Named):
    checkpoint: NotRequired[str | None]
    label: NotRequired[str | None]
    kwargs: NotRequired[dict[str, Any] | None]


class _Dataset(_Named):
    root: str
    label: NotRequired[str | None]


class _Training(TypedDict):
    seed: int
    epochs: PositiveInt


class _Distillation(TypedDict):
    teacher: _Network
    student: _Network
    selection: Literal["adaptive", "anti", "fixed", "random"]


class _Config(TypedDict):
    """The keys of ``config.yml`` that every version has and that the tools look at."""

    dataset: _Dataset
    training: _Training
    model: NotRequired[_Network | None]
    kd: NotRequired[_Distillation | None]
    kd_loss: NotRequired[_Named | None]


def _check_epoch(epoch: Epoch) -> Epoch:
    needed = {"train": ("loss/total",), "val": ("loss/total", "top1") if epoch["phase"] == "train" else ()}
    for group, names in needed.items():
        for name in names:
            if name not in epoch.get(group, {}):
                raise ValueError(f"{group} has no {name}")
    return epoch


def _check_gate_line(line: GateLine) -> GateLine:
    if any(len(shares) != len(line["gates"]) for shares in line["classes"]):
        raise ValueError("classes and gates do not fit together")
    return line


def _check_config(config: _Config) -> _Config:
    given = {name for name in ("model", "kd", "kd_loss") if config.get(name)}
    if given not in ({"model"}, {"kd", "kd_loss"}):
        raise ValueError("expected model, or kd and kd_loss")
    return config


_EPOCH = TypeAdapter(Annotated[Epoch, AfterValidator(_check_epoch)])
_RESULT = TypeAdapter(Result)
_FACTS = TypeAdapter(Facts)
_GATE_LINE = TypeAdapter(Annotated[GateLine, AfterValidator(_check_gate_line)])
_CONFIG = TypeAdapter(Annotated[_Config, AfterValidator(_check_config)])


def read_config(file: Path) -> dict[str, Any] | None:
    """The settings of a run as they were written; None if these are no settings of a run."""
    try:
        config = read_yaml(file)
        _CONFIG.validate_python(config)
    except UserError as error:
        warn(f"{error}; this run is left out")
    except ValidationError as error:
        warn(f"{file}: not the settings of a run ({first_problem(error)}); this run is left out")
    else:
        return config
    return None


def read_epochs(file: Path, phase: str | None = None) -> list[Epoch]:
    """The lines of a ``metrics.jsonl``, or those of one phase."""
    return [epoch for epoch in _read_lines(file, _EPOCH) if phase in (None, epoch["phase"])]


def read_result(file: Path) -> Result | None:
    """What ``result.json`` says; None if there is none."""
    return _read_json(file, _RESULT, "result")


def read_facts(file: Path) -> Facts | None:
    """What ``facts.json`` says; None if there is none."""
    return _read_json(file, _FACTS, "facts")


def read_gate_line(file: Path) -> GateLine | None:
    """The newest line of a ``gates.jsonl``, or None."""
    lines = _read_lines(file, _GATE_LINE)
    return lines[-1] if lines else None


def read_gate_samples(folder: Path) -> dict[str, np.ndarray] | None:
    """The newest ``epoch-N.npz`` of the folder, each of which counts from the beginning; None if there is none.

    See `utils.training.gate_counts.GateRecorder.write_samples` for what it holds.
    """
    files = {epoch_number(file): file for file in folder.glob("*.npz")}
    if None in files:
        warn(f"{files.pop(None)}: expected epoch-<number>.npz; left out")
    for _, file in sorted(files.items(), reverse=True):
        try:
            check_regular(file)
            with np.load(file) as content:
                counts = {name: content[name] for name in ("distilled", "seen", "labels")}
            if counts["distilled"].shape != (len(counts["seen"]), len(counts["labels"])):
                raise ValueError("its arrays do not fit together")
            return counts
        except Exception as error:  # on bytes that are no .npz NumPy may raise anything
            warn(f"{file}: no counts of gates ({reason(error)}); left out")
    return None


@cache
def warn(text: str) -> None:
    """Log a warning, once: a grid looks at its folders again and again."""
    log.warning(text)


def _read_lines(file: Path, shape: TypeAdapter[T]) -> list[T]:
    """The whole lines of the file; the last one may still be being written."""
    lines: list[T] = []
    broken = ""
    for number, line in enumerate((_read(file) or b"").split(b"\n")[:-1], 1):
        try:
            lines.append(shape.validate_json(line))
        except ValidationError as error:
            broken = broken or f"{file}: line {number} is no record ({first_problem(error)})"
    if broken:
        warn(f"{broken}; left out, with any other such line")
    return lines


def _read_json(file: Path, shape: TypeAdapter[T], what: str) -> T | None:
    content = _read(file)
    try:
        return None if content is None else shape.validate_json(content)
    except ValidationError as error:
        warn(f"{file}: no {what} of a run ({first_problem(error)}); left out")
        return None


def _read(file: Path) -> bytes | None:
    """What is in the file; None if there is none."""
    try:
        check_regular(file)
        return file.read_bytes()
    except FileNotFoundError:
        return None
    except UserError as error:
        warn(f"{error}; left out")
    except OSError as error:
        warn(f"{file}: cannot be read ({reason(error)}); left out")
    return None


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, e.g. ``"training.seed is missing"``."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where} is missing"
    return ": ".join(filter(None, (where, first["msg"].removeprefix("Value error, "))))
