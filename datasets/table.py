"""Images in a table: a text file that names their files, or Parquet and Arrow files that hold them."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datasets.folder import is_hidden
from datasets.registry import register_dataset
from datasets.rows import SPLITS, enumerate_some, source_of_rows, split_called
from datasets.source import Files, Source
from utils.errors import UserError, doing
from utils.files import check_regular

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger("sakd")

TEXT = (".csv", ".tsv", ".txt")
ARROW = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc"}
IMAGE = ("image", "img", "path", "file", "filename", "file_name", "filepath", "image_path", "images")
LABEL = ("label", "labels", "class", "target", "fine_label", "fine_labels", "category")


class Rows(NamedTuple):
    """What matters of a table.

    Attributes:
        images: paths of files, or the encoded images.
        labels: one per row.
        splits: one per row; None: there is no such column.
        class_names: what whole numbers in `labels` stand for; None: not known.
    """

    images: list[Path] | pyarrow.ChunkedArray
    labels: list[Any]
    splits: list[str] | None
    class_names: tuple[str, ...] | None = None


class EncodedImages(Files):
    """Encoded images (PNG, JPEG, ...) in a table, decoded when they are asked for.

    Args:
        column: of the table, ``large_binary``.
        where: what to call the table in messages.
        labels: the class of each image.
    """

    def __init__(self, column: pyarrow.ChunkedArray, where: str, labels: Sequence[int]):
        self._column, self._items, self._where = column, np.arange(len(column)), where
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.seen = True

    def path(self, index: int) -> str:
        return f"{self._where} row {self._items[index]}"

    def content(self, index: int) -> bytes:
        return self._column[int(self._items[index])].as_py() or b""  # nothing is no image, as other bytes are none


@register_dataset("csv", "parquet")
def table(
    root: Path, val_split: float | None = None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The images in a table, or in a folder of tables.

    A table is a text file in UTF-8 (``.csv``, ``.tsv``; commas, semicolons or tabs), or a Parquet or Arrow file
    (``.parquet``, ``.arrow``, ``.feather``). Its columns: the image (its path, relative to the table, or in Parquet and
    Arrow also the bytes of an image file, alone or in a struct with a field ``bytes``), the label (a word or a whole
    number), and perhaps ``split``. Without that column, the names of the files or folders of a folder say the split,
    as in ``train-0.parquet`` or ``test/0.parquet``; otherwise `val_split` divides the rows.

    Args:
        root: the file or folder.
        val_split: share of every class that validates.
        image_column: name of the column with the image; None: the first of `IMAGE` that is there.
        label_column: the same for the label, and `LABEL`.

    Raises:
        UserError: something is missing or cannot be read; the line names it.
    """
    files = _tables_in(root) if root.is_dir() else [root]
    parts = [_read(file, image_column, label_column) for file in files]
    of_files = _splits_of_files(files, root) if root.is_dir() else [None]
    splits = [split for part, of_file in zip(parts, of_files) for split in _splits(part, of_file, root)]
    if None in splits and set(splits) != {None}:
        raise UserError(
            f"{root}: says of some images only to which split they belong; name every file train... or val..."
        )
    names = {part.class_names for part in parts}
    if len(names) > 1:
        raise UserError(f"{root}: its files give the classes different names")
    images = _joined([part.images for part in parts], root)
    listed = isinstance(images, list)
    make = partial(Files, images, seen=False) if listed else partial(EncodedImages, images, str(root))
    labels = [label for part in parts for label in part.labels]
    return source_of_rows(make, labels, splits, val_split, str(root), class_names=names.pop())


def _warn_of_missing_parts(files: Sequence[Path]) -> None:
    """Hugging Face numbers the parts of a table: ``train-00000-of-00003.parquet``."""
    parts: dict[tuple[str, int], int] = {}
    for file in files:
        if match := re.fullmatch(r"(.*)-\d+-of-(\d+)", file.stem):
            parts[match[1], int(match[2])] = parts.get((match[1], int(match[2])), 0) + 1
    for (name, wanted), found in parts.items():
        if found != wanted:
            log.warning("%s: %d of the %d parts of %s are there", files[0].parent, found, wanted, name)


def _tables_in(folder: Path) -> list[Path]:
    """The Parquet and Arrow files below `folder` that are not hidden, or else the text files."""
    there = sorted(
        file for file in folder.rglob("*") if file.is_file() and not any(map(is_hidden, file.relative_to(folder).parts))
    )
    for endings in (ARROW, TEXT):
        if found := [file for file in there if file.suffix.lower() in endings]:
            _warn_of_missing_parts(found)
            return found
    raise UserError(f"dataset.root: {folder} holds no {', '.join((*ARROW, *TEXT))} file")


def _splits_of_files(files: list[Path], root: Path) -> list[str | None]:
    """The split of each file, by its name or that of a folder.

    Raises:
        UserError: the files are in several folders, so they are several data sets.
    """
    splits, subsets = [], set()
    for file in files:
        folders = file.relative_to(root).parts[:-1]
        word = re.match(r"[a-z]*", file.stem.casefold())[0]
        splits.append(split_called(word) or next(filter(None, map(split_called, folders)), None))
        subsets.add("/".join(folder for folder in folders if not split_called(folder)) or ".")
    if len(subsets) > 1:
        raise UserError(
            f"dataset.root: {root} holds several data sets, {enumerate_some(sorted(subsets))}; name the folder of one"
        )
    return splits


def _splits(part: Rows, of_file: str | None, root: Path) -> list[str | None]:
    if part.splits is None:
        return [of_file] * len(part.labels)
    known = {name: split_called(str(name)) for name in set(part.splits)}
    if unknown := sorted(repr(name) for name, split in known.items() if split is None):
        spellings = ", ".join(name for names in SPLITS.values() for name in names)
        raise UserError(f"{root}: split {enumerate_some(unknown)}, must be one of {spellings}")
    return [known[name] for name in part.splits]


def _joined(images: list[Any], root: Path) -> list[Path] | pyarrow.ChunkedArray:
    kinds = {isinstance(part, list) for part in images}
    if len(kinds) > 1:
        raise UserError(f"{root}: some of its files hold images, others the names of image files")
    if True in kinds:
        return [path for part in images for path in part]
    import pyarrow

    return pyarrow.chunked_array([chunk for part in images for chunk in part.chunks])


def _read(file: Path, image_column: str | None, label_column: str | None) -> Rows:
    with doing(f"reading {file}"):
        check_regular(file)
        if file.suffix.lower() in ARROW:
            return _read_arrow(file, image_column, label_column)
        return _read_text(file, image_column, label_column)


def _read_text(file: Path, image_column: str | None, label_column: str | None) -> Rows:
    import pandas

    with file.open(encoding="utf-8-sig") as opened, warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a line is longer than the first
        first = opened.readline()
        opened.seek(0)
        separator = max(",;\t", key=first.count)
        rows = pandas.read_csv(opened, sep=separator, dtype=str, keep_default_na=False, index_col=False)
    image, label, split = _columns(list(rows.columns), image_column, label_column, file)
    paths = [file.parent / path for path in rows[image].fillna("")]
    return Rows(paths, rows[label].tolist(), rows[split].tolist() if split else None)


def _read_arrow(file: Path, image_column: str | None, label_column: str | None) -> Rows:
    import pyarrow
    import pyarrow.compute
    import pyarrow.dataset

    data = pyarrow.dataset.dataset(file, format=ARROW[file.suffix.lower()])
    image, label, split = _columns(data.schema.names, image_column, label_column, file)
    table = data.to_table(columns=[name for name in (image, label, split) if name])
    column = table[image]
    if pyarrow.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = pyarrow.compute.struct_field(column, "bytes")
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        images = [file.parent / (path or "") for path in column.to_pylist()]
    elif pyarrow.types.is_binary(column.type) or pyarrow.types.is_large_binary(column.type):
        images = column.cast(pyarrow.large_binary())  # of one type, whichever each file has
    else:
        raise UserError(f"{file}: column {image} is {column.type}, expected image files, or their names")
    labels = table[label].to_pylist()
    if not all(isinstance(value, str | int | float | None) for value in labels):
        raise UserError(f"{file}: column {label} is {table[label].type}, expected words or whole numbers")
    names = _class_names(data.schema, label)
    return Rows(images, labels, table[split].to_pylist() if split else None, names)


def _class_names(schema: pyarrow.Schema, label: str) -> tuple[str, ...] | None:
    """The names of the classes, where Hugging Face's library wrote the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"])) or None
    except (KeyError, TypeError, ValueError):
        return None


def _columns(
    names: list[str], image_column: str | None, label_column: str | None, file: Path
) -> tuple[str, str, str | None]:
    """The columns of image, label and split."""
    folded = {name.strip().casefold(): name for name in reversed(names)}
    found = []
    for what, wanted, usual in (("image", image_column, IMAGE), ("label", label_column, LABEL)):
        key, there = f"dataset.{what}_column", [folded[name] for name in usual if name in folded]
        if wanted is not None and wanted not in names:
            raise UserError(f"{key}: {file} has no column {wanted}, only {enumerate_some(names, 20)}")
        if wanted is None and not there:
            raise UserError(
                f"{file}: no column is called {' or '.join(usual[:3])}; {key} names one of {enumerate_some(names, 20)}"
            )
        if wanted is None and len(there) > 1:
            log.info("%s: %s is the %s, of %s; %s names another", file, there[0], what, ", ".join(there), key)
        found.append(wanted or there[0])
    return (*found, folded.get("split"))
