"""Which spots a run's policy picks: for image files, for a class, or for every class of the validation images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import pandas as pd
import torch
from torch import Tensor

from distillers.spot_adaptive.distillation import SpotAdaptiveDistillation
from distillers.spot_adaptive.policy import Policy
from distillers.spot_adaptive.selection import SELECTIONS
from utils.command import Parser, guarded, whole_number
from utils.errors import UserError, enumerate_some
from utils.report.table import markdown
from utils.training.restore import Restored, add_arguments, restore_from

ALL = "all classes"
WITH_POLICY = [name for name, selection in SELECTIONS.items() if selection.policy]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m utils.inspect_gates",
        description=__doc__,
        epilog="Without images and --class: every class. Spots: fN is feature N, logits the loss at the logits.",
    )
    add_arguments(parser, f"a checkpoint of a run with a policy ({', '.join(WITH_POLICY)})")
    parser.add_argument(
        "words", nargs="*", metavar="IMAGE|key=value", help="image files; config keys, e.g. dataset.root=data"
    )
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="each validation image of one class")
    parser.add_argument(
        "--limit",
        type=whole_number(0),
        default=20,
        metavar="N",
        help="images of that class to list (default: %(default)s)",
    )
    options = parser.parse_intermixed_args(arguments)
    images = [word for word in options.words if "=" not in word]
    restored = restore_from(options, [word for word in options.words if "=" in word])
    kd = restored.config.kd
    if kd and kd.selection not in WITH_POLICY:
        has_one = f"runs with kd.selection {' or '.join(WITH_POLICY)} have one"
        raise UserError(f"{restored.path}: of a {kd.selection} run, which has no policy; {has_one}")
    task = restored.task()
    shuffled = " (as the policy says; its gates are then shuffled)" if task.selection == "shuffled" else ""
    own = type(task.policy).chances is not Policy.chances
    what = "chance of being distilled" if own else "gates of one draw (the policy says no chances)"
    print(f"{restored.path}: {task.selection}; {what} at each spot{shuffled}, in percent")
    if images:
        chances = [distil_chances(task, restored.source.read(file)[None].to(restored.device))[0] for file in images]
        table = _table("image", task, zip(images, chances))
    elif options.class_name:
        table = of_class(restored, task, options.class_name, options.limit)
    else:
        table = of_classes(restored, task)
    print(markdown(table))
    return 0


@torch.inference_mode()
def distil_chances(task: SpotAdaptiveDistillation, images: Tensor, label: Tensor | None = None) -> Tensor:
    """Probability of being distilled at each spot, ``[B, K + 1]``, before any shuffling.

    Args:
        images: normalised, ``[B, 3, H, W]``.
        label: ``[B]``; None for what the teacher takes the images for.
    """
    features, logits = task.student.features(images)
    teacher_features, teacher_logits = task.teacher.features(images)
    label = teacher_logits.argmax(dim=1) if label is None else label
    chances = task.chances(task.policy_input(features, teacher_features, logits, teacher_logits, label))
    return 1 - chances if task.selection == "anti" else chances


def of_class(restored: Restored, task: SpotAdaptiveDistillation, name: str, limit: int) -> pd.DataFrame:
    """The mean over the validation images of a class, then the first `limit` of them, each with its file.

    Where the data set does not consist of files, images are called by their place in the split.
    """
    names = restored.source.class_names
    if name not in names:
        raise UserError(f"--class: the data set has no class {name!r}; known are {enumerate_some(names, 20)}")
    index, label, chances = validation_chances(restored, task)
    chosen = label == names.index(name)
    if not chosen.any():
        raise UserError(f"--class: no validation image is of class {name!r}")
    rows = [(f"mean of {int(chosen.sum())}", chances[chosen].mean(dim=0))]
    name_of = getattr(restored.source.val, "path", "validation image {}".format)
    rows += [(name_of(k), row) for k, row in zip(index[chosen].tolist()[:limit], chances[chosen])]
    return _table(f"class {name}", task, rows)


def of_classes(restored: Restored, task: SpotAdaptiveDistillation) -> pd.DataFrame:
    """The mean over the validation images of every class."""
    _, label, chances = validation_chances(restored, task)
    rows = [(ALL, chances.mean(dim=0))]
    for k, name in enumerate(restored.source.class_names):
        if (label == k).any():
            rows.append((name, chances[label == k].mean(dim=0)))
    return _table("class", task, rows)


def validation_chances(restored: Restored, task: SpotAdaptiveDistillation) -> tuple[Tensor, Tensor, Tensor]:
    """Index ``[N]``, label ``[N]`` and chances ``[N, K + 1]`` of every validation image."""
    parts = [(b.index, b.label, distil_chances(task, b.image, b.label)) for b in restored.val.epoch(0)]
    return tuple(torch.cat(column).cpu() for column in zip(*parts))


def _table(heading: str, task: SpotAdaptiveDistillation, rows: Iterable[tuple[str, Tensor]]) -> pd.DataFrame:
    cells = [[name, *(f"{100 * chance:.0f}" for chance in row.tolist())] for name, row in rows]
    return pd.DataFrame(cells, columns=[heading, *task.gate_labels])


if __name__ == "__main__":
    guarded(main)
