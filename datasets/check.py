"""Is what a source found fit to train on? Asked once, before anything is built on it."""

from __future__ import annotations

import logging
import os
from dataclasses import replace

import torch

from datasets.folders import enumerate_some
from datasets.loading.decode import find_unreadable
from datasets.source import Arrays, Files, Source, Split
from utils.errors import UserError

log = logging.getLogger("sakd")


def check_labels(source: Source) -> None:
    """Refuse arrays of another kind, images without a label, labels that stand for no class, and a single class.

    A class without training images is a warning.

    Raises:
        UserError: the line names the split, the image and the label.
    """
    classes = len(source.class_names)
    for what, split in _splits(source):
        if len(split) == 0:
            raise UserError(f"the data set holds no {what} images")
        if isinstance(split, Arrays):
            _check_arrays(what, split)
        wrong = ((split.labels < 0) | (split.labels >= classes)).nonzero().flatten().tolist()
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(
                f"{what} image {wrong[0]}{more} has the label {split.labels[wrong[0]]}, out of range: "
                f"{classes} classes are numbered from 0"
            )
    present = set(source.train.labels.tolist())
    if len(present) == 1:
        name = source.class_names[int(source.train.labels[0])]
        raise UserError(f"all training images are of one class, {name}; there is nothing to tell it from")
    if missing := [name for number, name in enumerate(source.class_names) if number not in present]:
        log.warning("no image to train on of %s, though there are %d classes", enumerate_some(missing), classes)


def _check_arrays(what: str, split: Arrays) -> None:
    images, labels = split.images, split.labels
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
        raise UserError(f"the {what} images are {_kind(images)}, expected uint8 [N, 3, H, W]")
    if labels.dtype != torch.int64 or labels.ndim != 1:
        raise UserError(f"the {what} labels are {_kind(labels)}, expected int64 [N]")
    if len(split.images) != len(split.labels):
        raise UserError(f"the data set holds {len(split.images)} {what} images, {len(split.labels)} labels")


def _kind(values: torch.Tensor) -> str:
    """``"float32 [2, 3, 8, 8]"``."""
    return f"{values.dtype} {list(values.shape)}".removeprefix("torch.")


def check_files(source: Source) -> None:
    """Refuse files of a list that are not there, which streaming would find in the middle of an epoch.

    Raises:
        UserError: the line names the first.
    """
    for what, split in _splits(source):
        if isinstance(split, Files) and not split.seen:
            missing = [path for path in map(split.path, range(len(split))) if not os.path.exists(path)]
            if missing:
                raise UserError(
                    f"{missing[0]}: not there ({len(missing)} of {len(split)} {what} images are missing); "
                    "dataset.on_corrupt=skip leaves such images out"
                )


def without_unreadable(source: Source, workers: int) -> Source:
    """`source` without the files that cannot be decoded.

    Every file is decoded once to find them, which takes about as long as an epoch without training. The alternative,
    to pass over a file when its turn comes, would give batches of changing size, and shift what follows.

    Args:
        source: the data set.
        workers: processes that decode.

    Raises:
        UserError: a training class, or the whole of validation, has no readable file.
    """
    train, val = (_readable_part(what, split, source, workers) for what, split in _splits(source))
    return replace(source, train=train, val=val)


def _splits(source: Source) -> list[tuple[str, Split]]:
    return [("training", source.train), ("validation", source.val)]


def _readable_part(what: str, split: Split, source: Source, workers: int) -> Split:
    broken = {} if isinstance(split, Arrays) else find_unreadable(split, workers)
    if not broken:
        return split
    first = next(iter(broken.values()))
    rest = split.subset([index for index in range(len(split)) if index not in broken])
    lost = sorted(set(split.labels.tolist()) - set(rest.labels.tolist()))
    if len(rest) == 0 or (lost and what == "training"):
        names = enumerate_some([source.class_names[label] for label in lost])
        raise UserError(f"no {what} image of class {names} can be read; the first: {first}")
    log.warning("dataset.on_corrupt: %d of %d %s images skipped, the first: %s", len(broken), len(split), what, first)
    return rest
