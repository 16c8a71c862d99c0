"""Whether a run can go on from a checkpoint. This is asked before anything in its folder is written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, FiniteFloat, NonNegativeInt, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass
from typing_extensions import TypedDict

from utils.config.changes import deciding_settings, differences
from utils.errors import UserError

FORMAT = 1
Section = dict[str, Any]


@dataclass
class Progress:
    """What to do next: step `step` of epoch `epoch` of phase `phase`, all counted from 0."""

    phase: NonNegativeInt = 0
    epoch: NonNegativeInt = 0
    step: NonNegativeInt = 0


class Best(TypedDict):
    """The best epoch so far, counted from 1; ``{"top1": -1.0, "epoch": 0}`` before there is one."""

    top1: FiniteFloat
    epoch: NonNegativeInt


class Meter(TypedDict):
    """See `utils.training.meter.Meter.state_dict`."""

    names: list[str]
    sums: Any
    count: NonNegativeInt
    finite_steps: NonNegativeInt


class Process(TypedDict):
    """What each process knows alone."""

    rng: Section
    meter: Meter


class Checkpoint(TypedDict):
    """A checkpoint of a run; tensors are checked when they are loaded."""

    __pydantic_config__ = ConfigDict(extra="allow")

    format: Literal[1]
    model: Section
    extra: Section
    optimizers: dict[str, Section]
    processes: Annotated[list[Process], Field(min_length=1)]
    progress: Progress
    gates: Section
    val: dict[str, FiniteFloat]
    best: Best
    config: Section


_CHECKPOINT = TypeAdapter(Checkpoint)


def check_checkpoint(content: dict[str, Any], config: Section, epochs: Sequence[int], steps: int) -> Checkpoint:
    """Check that a run of `config` can go on from a checkpoint, as far as that can be told without its tensors.

    Args:
        content: what is in the file.
        config: the settings of the run from now on.
        epochs: of every phase.
        steps: of every epoch.

    Returns:
        `content`, validated.

    Raises:
        UserError: it is damaged or does not fit.
    """
    try:
        checkpoint = _CHECKPOINT.validate_python(content)
    except ValidationError as error:
        raise UserError(f"it is damaged, or of another program: {first_problem(error)}") from None
    progress = checkpoint["progress"]
    if progress.phase >= len(epochs):
        raise UserError(f"it is of a run with {progress.phase + 1} phases or more, this one has {len(epochs)}")
    done, wanted = progress.epoch, epochs[progress.phase]
    is_last = progress.phase == len(epochs) - 1
    needed = done + (not is_last or progress.step > 0)
    if wanted < needed:
        key = "training.epochs" if is_last else "pretrain.epochs"
        begun = f" and {progress.step} steps of the next" if progress.step else ""
        raise UserError(f"{key} is {wanted}, but {done} epochs{begun} are done; set {key}={needed} or more")
    if progress.step > steps:
        raise UserError(f"it was written after step {progress.step} of an epoch of {steps} steps")
    _check_changes(checkpoint, config, finished=done == wanted)
    return checkpoint


def _refuse_other_optimizer(before: Section, after: Section) -> None:
    """Raise a UserError if a run would go on with another optimiser than that whose averages its checkpoint has."""
    old, new = map(_optimizer, (before, after))
    for key in ("name", "options"):
        if old[key] != new[key]:
            raise UserError(
                f"training.optimizer.{key} is {new[key]}, but it is of a run with {old[key]}; "
                f"set training.optimizer.{key}={old[key]}"
            )


def _optimizer(config: Section) -> Section:
    chosen = {"name": "SGD", "options": {}}  # of the time when there was no choice
    match config:
        case {"training": {"optimizer": dict(optimizer)}}:
            chosen |= optimizer
    return chosen


def _check_changes(checkpoint: Checkpoint, config: Section, *, finished: bool) -> None:
    """Refuse what a run cannot change: its optimiser, in the middle of an epoch the batches, and after its end all."""
    before = checkpoint["config"]
    _refuse_other_optimizer(before, config)
    changes = differences(before, config)
    if checkpoint["progress"].step and "training.batch_size" in changes:
        old, new = changes["training.batch_size"]
        raise UserError(
            f"training.batch_size is {new}, but it was written in the middle of an epoch of batches of {old}; "
            f"set training.batch_size={old}"
        )
    if not finished:
        return
    if "top1" not in checkpoint["val"]:
        raise UserError("it is of a finished run, but holds no accuracy")
    deciding = differences(deciding_settings(before), deciding_settings(config))
    deciding.pop("training.epochs", None)
    for key, (old, new) in deciding.items():
        raise UserError(
            f"it is of a finished run with {key}={old}, and {new} would have no effect; a larger training.epochs goes "
            "on, --overwrite starts anew, another training.seed or run.root writes elsewhere"
        )


def first_problem(error: ValidationError) -> str:
    """The first thing that is wrong, e.g. ``"training.seed is missing"``."""
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "missing":
        return f"{where} is missing"
    return ": ".join(filter(None, (where, first["msg"].removeprefix("Value error, "))))
