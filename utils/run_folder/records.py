"""The small files of a run folder, read back. What cannot be read counts as not there; a warning line names it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from utils.errors import UserError, doing, reason
from utils.files import check_regular, warn_once

T = TypeVar("T")

Epoch = dict[str, Any]  # a line of metrics.jsonl, see `read_epochs`
FACTS = ("train_images", "val_images", "classes", "image_size", "parameters", "weights", "device")  # every run has them


def read_epochs(file: Path, phase: str | None = None) -> list[Epoch]:
    """The lines of a ``metrics.jsonl``, or those of one phase.

    Each is an epoch: ``phase`` (``pretrain``, in which a distiller trains alone and nothing is validated, or
    ``train``), ``epoch``, ``seconds``, and the means over its images, ``train`` and ``val``, by name. A value that is
    not finite is NaN.
    """
    return [epoch for epoch in read_lines(file, _epoch) if phase in (None, epoch["phase"])]


def read_result(file: Path) -> dict[str, float] | None:
    """The accuracies in ``result.json``, in percent: ``best_top1``, ``last_top1``, under a teacher ``teacher_top1``.

    Where the data has a test split, ``test_top1`` is that of the best epoch.
    """
    return _read_json(file, lambda found: _numbers({k: v for k, v in found.items() if k.endswith("_top1")}))


def read_facts(file: Path) -> dict[str, Any]:
    """``facts.json``, what is known of a run before its first step; empty for older runs, which have none.

    ``train_images``, ``val_images`` and ``classes`` are numbers, ``image_size`` is height and width, ``parameters`` and
    ``flops`` are the student's, those of its teacher begin with ``teacher_``. FLOPs are of one image's forward pass,
    two for a multiplication and an addition; None if not known. ``weights`` has, for each weighted term of the loss,
    its weight and over how many epochs it grows to that. ``device`` and ``command`` are those of the last start.
    """
    return _read_json(file, lambda facts: {name: facts[name] for name in FACTS} | facts) or {}


def read_latencies(file: Path) -> dict[str, float]:
    """The latency of one image in milliseconds by network in ``evaluation.json``; empty if nothing was evaluated."""
    return _read_json(file, lambda found: {name: float(at["milliseconds"]["1"]) for name, at in found.items()}) or {}


def read_file(file: Path, read: Callable[[Path], T]) -> T | None:
    """What `read` makes of the file; None if there is none, or, with a warning, if anything goes wrong."""
    if not os.path.lexists(file):
        return None
    try:
        with doing(f"reading {file}"):
            check_regular(file)
            return read(file)
    except UserError as error:
        warn_once(f"{error}; left out")
        return None


def read_lines(file: Path, parse: Callable[[bytes], T]) -> list[T]:
    """Every line that `parse` takes. The first that it does not take is named."""
    found: list[T] = []
    broken = ""
    for number, line in enumerate((read_file(file, Path.read_bytes) or b"").splitlines(), 1):
        try:
            found.append(parse(line))
        except Exception as error:  # a damaged line may raise anything
            broken = broken or f"{file}: line {number} cannot be read ({reason(error)})"
    if broken:
        warn_once(f"{broken}; left out, with any other such line")
    return found


def _epoch(line: bytes) -> Epoch:
    record = json.loads(line)
    means = {part: _numbers(record.get(part, {})) for part in ("train", "val")}
    numbers = {"epoch": int(record["epoch"]), "seconds": float(record["seconds"])}
    return record | {"phase": str(record["phase"])} | numbers | means


def _read_json(file: Path, take: Callable[[Any], T]) -> T | None:
    return read_file(file, lambda file: take(json.loads(file.read_bytes())))


def _numbers(values: dict[str, Any]) -> dict[str, float]:
    numbers = {name: math.nan if value is None else float(value) for name, value in values.items()}
    return {name: number if math.isfinite(number) else math.nan for name, number in numbers.items()}
