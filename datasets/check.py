"""Is what a source found fit to train on? Asked once, before anything is built on it."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from datasets.download import may_write
from datasets.images import DEEP_RANGE, is_deep, open_image
from datasets.loading.decode import find_unreadable
from datasets.rows import enumerate_some
from datasets.source import Arrays, Files, Source, Split
from utils.errors import UserError
from utils.files import write_text
from utils.processes.group import from_main, is_main

log = logging.getLogger("sakd")

SAMPLED = 64  # images whose values are looked at
DARK = 0x4000  # largest value of an image of 16 bits that looks nearly black: a quarter of the range
_REMEMBERED = "# Images that dataset.on_corrupt=skip leaves out. Without this file they are searched for again. "


def check_labels(source: Source) -> None:
    """Refuse arrays of another kind, images without a label, labels that stand for no class, and a single class.

    A class without training images is a warning.

    Raises:
        UserError: the line names the split, the image and the label.
    """
    classes = len(source.class_names)
    for what, split in source.splits().items():
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
    for what, split in source.splits().items():
        if isinstance(split, Files) and not split.seen:
            missing = [path for path in map(split.path, range(len(split))) if not os.path.exists(path)]
            if missing:
                raise UserError(
                    f"{missing[0]}: not there ({len(missing)} of {len(split)} {what} images are missing); "
                    "dataset.on_corrupt=skip leaves such images out"
                )


def warn_of_dark_images(source: Source) -> None:
    """Say so if images of 16 or 32 bits use a small part of the range, or other values than 16 bits hold."""
    split = source.train
    if not isinstance(split, Files) or split.value_range is not None:
        return
    extremes = []
    for index in range(0, len(split), -(-len(split) // SAMPLED)):
        with suppress(Exception), open_image(split.path(index), split.content(index)) as image:  # others refuse it
            if is_deep(image) and image.mode != "F":
                values = np.asarray(image)
                extremes += [int(values.min()), int(values.max())]
    if extremes and (min(extremes) < 0 or not DARK <= max(extremes) < DEEP_RANGE[1]):
        low, high = min(*extremes, 0), max(extremes)
        log.warning(
            "images of more than 8 bits: %d is the largest value of %d of them, and 0 to 65535 become black to white; "
            "dataset.image_range=[%d,%d] says what is black and white here",
            high,
            len(extremes) // 2,
            low,
            high,
        )


def without_unreadable(source: Source, workers: int, root: Path) -> Source:
    """`source` without the files that cannot be decoded.

    Every file is decoded once to find them, which takes about as long as an epoch without training. The alternative,
    to pass over a file when its turn comes, would give batches of changing size, and shift what follows. What was found
    is written to a file in `root`, or beside it, so that the next command need not search again.

    Args:
        source: the data set.
        workers: processes that decode.
        root: where the data set lies.

    Raises:
        UserError: a training class, or the whole of validation, has no readable file.
    """
    memory = root / "unreadable-images.txt" if root.is_dir() else root.with_name(f"{root.name}.unreadable.txt")
    splits = {what: split for what, split in source.splits().items() if not isinstance(split, Arrays)}
    if not splits:
        return source
    digest = _digest(splits) if is_main() else None
    found = from_main(_recall(memory, digest) if is_main() else None)
    is_known = found is not None
    if not is_known:
        found = {what: find_unreadable(split, workers) for what, split in splits.items()}
        is_known = digest is not None and may_write() and _remember(memory, digest, found)
    more = f"; {memory} names all" if is_known else ""
    parts = [_readable_part(what, split, found.get(what, {}), source, more) for what, split in source.splits().items()]
    return replace(source, **dict(zip(("train", "val", "test"), parts)))


def _readable_part(what: str, split: Split, broken: dict[int, str], source: Source, more: str) -> Split:
    if not broken:
        return split
    first = next(iter(broken.values()))
    rest = split.subset([index for index in range(len(split)) if index not in broken])
    lost = sorted(set(split.labels.tolist()) - set(rest.labels.tolist()))
    if len(rest) == 0 or (lost and what == "training"):
        names = enumerate_some([source.class_names[label] for label in lost])
        raise UserError(f"no {what} image of class {names} can be read; the first: {first}")
    log.warning(
        "dataset.on_corrupt: %d of %d %s images skipped, the first: %s%s", len(broken), len(split), what, first, more
    )
    return rest


def _digest(splits: dict[str, Split]) -> str | None:
    """Changes with the images; None where that cannot be said of a split."""
    if not all(isinstance(split, Files) for split in splits.values()):
        return None
    digest = hashlib.sha256()
    for split in splits.values():
        for index in range(len(split)):
            digest.update(os.fsencode(split.path(index)))
            if (content := split.content(index)) is not None:
                digest.update(content)
                continue
            with suppress(OSError):
                status = os.stat(split.path(index))
                digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
        digest.update(b"end of a split")
    return digest.hexdigest()[:32]


def _recall(memory: Path, digest: str | None) -> dict[str, dict[int, str]] | None:
    """What is remembered of these very images; None: nothing."""
    try:
        first, *lines = memory.read_text(encoding="utf-8").splitlines()
        if digest is None or first != f"{_REMEMBERED}{digest}":
            return None
        found: dict[str, dict[int, str]] = {}
        for what, index, line in (line.split("\t", 2) for line in lines):
            found.setdefault(what, {})[int(index)] = line
        return found
    except (OSError, ValueError):
        return None


def _remember(memory: Path, digest: str, found: dict[str, dict[int, str]]) -> bool:
    """Write the file, unless there is another one; whether that was possible."""
    lines = [f"{what}\t{index}\t{line}\n" for what, broken in found.items() for index, line in broken.items()]
    try:
        if memory.exists() and not memory.read_text(encoding="utf-8").startswith(_REMEMBERED):
            raise FileExistsError(f"{memory} is another file")
        write_text(memory, f"{_REMEMBERED}{digest}\n{''.join(lines)}")
    except (OSError, ValueError) as error:
        log.warning("the unreadable images are searched for again next time: %s", error)
        return False
    return True
