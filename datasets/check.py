"""Is what a source found fit to train on? Asked once, before anything is built on it."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from datasets.download import may_write
from datasets.images import DEEP_RANGE, is_deep, open_image
from datasets.loading.decode import find_unreadable
from datasets.source import Arrays, Files, Source, Split
from utils.errors import UserError, enumerate_some
from utils.files import write_text
from utils.processes.group import from_main, is_main

if TYPE_CHECKING:
    from utils.config.schema import DatasetConfig

log = logging.getLogger("sakd")

SAMPLED = 64  # images whose values are looked at
DARK = 0x4000  # largest value of an image of 16 bits that looks nearly black: a quarter of the range
REMEMBERED = "sakd-unreadable-images.json"


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
            images, labels = split.images, split.labels
            kinds = [f"{values.dtype} {list(values.shape)}".removeprefix("torch.") for values in (images, labels)]
            is_batch = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
            if not is_batch or labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
                raise UserError(
                    f"{what}: found images {kinds[0]} and labels {kinds[1]}, expected uint8 [N, 3, H, W] and int64 [N]"
                )
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


def check_files(source: Source) -> None:
    """Refuse files of a list that are not there, which streaming would find in the middle of an epoch.

    A file with two labels is a warning.

    Raises:
        UserError: the line names the first.
    """
    for what, split in source.splits().items():
        if isinstance(split, Files) and not split.found:
            rows = [(split.path(row), label) for row, label in enumerate(split.labels.tolist())]
            labels = dict(rows)
            if path := next((path for path, label in rows if labels[path] != label), None):
                log.warning("%s: has two labels among the %s images, and perhaps others have", path, what)
            missing = [path for path, _ in rows if not os.path.isfile(path)]
            if missing:
                remedy = "dataset.on_corrupt=skip leaves such images out"
                if len(missing) == len(split):
                    remedy = "a table's paths start from its folder, and have no \\ between folders"
                raise UserError(
                    f"{missing[0]}: is no file ({len(missing)} of {len(split)} {what} images are missing); {remedy}"
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


def readable_part(source: Source, config: DatasetConfig, workers: int) -> Source:
    """With ``dataset.on_corrupt: skip``, `source` without the files that cannot be decoded.

    Every file is decoded once to find them, which takes about as long as an epoch without training. The alternative,
    to pass over a file when its turn comes, would give batches of changing size, and shift what follows. What was found
    is written to a file in the data set's folder, or beside it, so that the next command need not search again.

    Args:
        source: the data set.
        config: the keys ``dataset.*``.
        workers: processes that decode.

    Raises:
        UserError: a training class, or the whole of validation, has no readable file.
    """
    files = {what: split for what, split in source.splits().items() if isinstance(split, Files)}
    if config.on_corrupt != "skip" or not files or source.decoded:
        return source
    root = Path(config.root)
    memory = root / REMEMBERED if root.is_dir() else root.with_name(f"{root.name}.{REMEMBERED}")
    digest = _digest(files) if is_main() else ""
    found = from_main(_recall(memory, digest) if is_main() else None)
    is_written = found is not None
    if not is_written:
        found = {what: find_unreadable(split, workers) for what, split in files.items()}
        if is_main() and may_write.get():
            try:
                write_text(memory, json.dumps({"digest": digest, "found": found}, indent=1))
                is_written = True
            except OSError as error:
                log.warning("images that cannot be read are searched for again next time: %s", error)
    if any(found.values()) and is_written:
        log.info("%s names all images that cannot be read", memory)
    parts = [_without(found.get(what), what, split, source) for what, split in source.splits().items()]
    return replace(source, **dict(zip(("train", "val", "test"), parts)), decoded=True)


def _without(broken: dict[int, str] | None, what: str, split: Split, source: Source) -> Split:
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


def _digest(files: dict[str, Files]) -> str:
    """Changes with the images: their paths, and their sizes and times, or what is in them."""
    digest = hashlib.sha256()
    for what, split in files.items():
        digest.update(what.encode())
        for index in range(len(split)):
            path, content = split.path(index), split.content(index)
            digest.update(os.fsencode(path))
            with suppress(OSError):  # it is not there
                digest.update(content or repr((os.stat(path).st_size, os.stat(path).st_mtime_ns)).encode())
    return digest.hexdigest()


def _recall(memory: Path, digest: str) -> dict[str, dict[int, str]] | None:
    """What is remembered of these very images; None: nothing."""
    with suppress(Exception):  # a file that is not there or damaged is written anew
        known = json.loads(memory.read_text(encoding="utf-8"))
        if known["digest"] == digest:
            return {what: {int(index): line for index, line in found.items()} for what, found in known["found"].items()}
    return None
