"""Whether a run can go on from a checkpoint. This is asked before anything in its folder is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from utils.config.changes import deciding_settings, differences
from utils.config.yaml_text import spell
from utils.errors import UserError, doing

FORMAT = 1
Section = dict[str, Any]


@dataclass
class Progress:
    """What to do next: step `step` of epoch `epoch` of phase `phase`, all counted from 0."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


def check_checkpoint(content: Section, config: Section, epochs: Sequence[int], steps: int, run: Path) -> None:
    """Check that a run of `config` can go on from a checkpoint, tensors aside.

    Args:
        content: what is in the file.
        config: the settings of the run from now on.
        epochs: of every phase.
        steps: of every epoch.
        run: the folder, for messages.

    Raises:
        UserError: the checkpoint does not fit; the line says which setting it needs. Or it is damaged.
    """
    with doing(f"{run}: going on from its checkpoint"):
        if problem := _find_problem(content, config, epochs, steps):
            raise UserError(f"{run}: cannot go on from its checkpoint: {problem}")


def refuse_other_images(checkpoint: Section, images: int, what: str) -> None:
    """Raise a UserError if a checkpoint, called `what`, was trained on another number of images.

    Gates are counted, and embeddings kept, for each training image by its number.
    """
    before = len(checkpoint["gates"]["sample_seen"])
    if before != images:
        raise UserError(
            f"{what} was trained on {before:,} images, here are {images:,}; --overwrite starts anew, another "
            "dataset.label or run.root writes elsewhere"
        )


def _find_problem(content: Section, config: Section, epochs: Sequence[int], steps: int) -> str:
    """Why the run cannot go on; empty if it can."""
    if content["format"] != FORMAT:
        return f"its format is {content['format']}, this version reads {FORMAT}"
    before, progress = content["config"], Progress(**content["progress"])
    if min(progress.phase, progress.epoch, progress.step) < 0:
        return f"it is damaged, progress is {content['progress']}"
    if progress.phase >= len(epochs):
        return f"it is of a run with {progress.phase + 1} phases or more, this one has {len(epochs)}"
    is_last = progress.phase == len(epochs) - 1
    done, wanted = progress.epoch, epochs[progress.phase]
    needed = done + (not is_last or progress.step > 0)
    if wanted < needed:
        key = "training.epochs" if is_last else "pretrain.epochs"
        begun = f" and {progress.step} steps of the next" if progress.step else ""
        return f"{key} is {wanted}, but {done} epochs{begun} are done; set {key}={needed} or more"
    changes = differences(before, config)
    for key, is_fixed, why in (
        ("pretrain.epochs", progress.phase > 0, "that phase is over after"),
        ("training.optimizer.name", True, "it is of a run with"),
        ("training.optimizer.options", True, "it is of a run with"),
        ("training.batch_size", progress.step > 0, "it was written in the middle of an epoch with"),
        ("dataset.sampler", progress.step > 0, "it was written in the middle of an epoch with"),
    ):
        if is_fixed and key in changes:
            old, new = map(spell, changes[key])
            return f"{key} is {new}, but {why} {old}; set {key}={old}"
    if progress.step > steps:
        return f"it was written after step {progress.step} of an epoch of {steps} steps"
    return _missing_states(content, progress) or _no_effect(content, config, finished=done == wanted)


def _missing_states(content: Section, progress: Progress) -> str:
    """A user may have deleted what the optimisers remember, to save space; a run that goes on is another one then."""
    first = content["config"]["training"].get("init_epoch", 0)
    if progress.step == 0 and progress.epoch in (0, first):  # the phase has not begun
        return ""
    for name, optimizer in content["optimizers"].items():
        group = optimizer["param_groups"][0]
        is_plain_sgd = "nesterov" in group and not group["momentum"]
        if not optimizer["state"] and not is_plain_sgd:
            return f"it lacks the state of the optimiser of {name}; kd.student.checkpoint starts from its weights alone"
    return ""


def _no_effect(content: Section, config: Section, *, finished: bool) -> str:
    """After its end, a run uses no setting any more."""
    if not finished:
        return ""
    if "top1" not in content["val"]:
        return "it is of a finished run, but holds no accuracy"
    deciding = differences(deciding_settings(content["config"]), deciding_settings(config))
    deciding.pop("training.epochs", None)
    for key, (old, new) in deciding.items():
        return (
            f"it is of a finished run with {key}={old}, and {new} would have no effect; a larger training.epochs goes "
            "on, --overwrite starts anew, another training.seed or run.root writes elsewhere"
        )
    return ""
