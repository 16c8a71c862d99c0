"""Whether a checkpoint is of the config and the data in use. This is asked before anything in its folder is written."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Source
from utils.config.changes import deciding_settings, differences
from utils.config.yaml_text import spell
from utils.errors import UserError, doing

log = logging.getLogger("sakd")

FORMAT = 1
Section = dict[str, Any]


@dataclass
class Progress:
    """What to do next: step `step` of epoch `epoch` of phase `phase`, all counted from 0."""

    phase: int = 0
    epoch: int = 0
    step: int = 0


def check_checkpoint(content: Section, config: Section, epochs: Sequence[int], images: int, run: Path) -> None:
    """Check that a run of `config` can go on from a checkpoint, tensors aside.

    Args:
        content: what is in the file.
        config: the settings of the run from now on.
        epochs: of every phase.
        images: to train on.
        run: the folder, for messages.

    Raises:
        UserError: the checkpoint does not fit; the line says which setting it needs. Or it is damaged.
    """
    with doing(f"{run}: going on from its checkpoint"):
        if problem := _find_problem(content, config, epochs, images):
            raise UserError(f"{run}: cannot go on from its checkpoint: {problem}")


def refuse_other_classes(checkpoint: dict[str, Any], source: Source, what: str) -> None:
    """Compare the data that a checkpoint was trained on with the data in use; files of other projects do not say.

    Another normalisation or image size is one line in the log.

    Args:
        checkpoint: its content.
        source: the data in use.
        what: how messages call the checkpoint.

    Raises:
        UserError: the classes are others, or in another order.
    """
    there, here = checkpoint.get("data"), source.describe()
    if not isinstance(there, dict) or not isinstance(theirs := there.get("classes"), list):
        return
    ours = here.pop("classes")
    for number, (their, our) in enumerate(zip_longest(map(repr, theirs), map(repr, ours), fillvalue="missing")):
        if their != our:
            raise UserError(
                f"{what} knows other classes than the data set: {len(theirs)} classes, here {len(ours)}, and number "
                f"{number} is {their}, here {our}; name one of these classes, or give other data a dataset.label"
            )
    changes = [f"{key} {there[key]}, here {value}" for key, value in here.items() if there.get(key, value) != value]
    if changes:
        log.warning("%s was trained on images prepared in another way: %s", what, "; ".join(changes))


def _find_problem(content: Section, config: Section, epochs: Sequence[int], images: int) -> str:
    """Why the run cannot go on; empty if it can."""
    if content["format"] != FORMAT:
        return f"its format is {content['format']}, this version reads {FORMAT}"
    before, progress = content["config"], Progress(**content["progress"])
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
    # Gates are counted, and embeddings kept, for each training image by its number.
    if (seen := len(content["gates"]["sample_seen"])) != images:
        return (
            f"it was trained on {seen:,} images, here are {images:,}; --overwrite starts anew, another dataset.label "
            "or run.root writes elsewhere"
        )
    return _missing_states(content, progress) or (_no_effect(content, config) if done == wanted else "")


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


def _no_effect(content: Section, config: Section) -> str:
    """After its end, a run uses no setting any more."""
    deciding = differences(deciding_settings(content["config"]), deciding_settings(config))
    deciding.pop("training.epochs", None)
    for key, (old, new) in deciding.items():
        return (
            f"it is of a finished run with {key}={old}, and {new} would have no effect; a larger training.epochs goes "
            "on, --overwrite starts anew, another training.seed or run.root writes elsewhere"
        )
    return ""
