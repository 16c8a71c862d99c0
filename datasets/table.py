"""Images in a table: a text file that names their files, or Parquet and Arrow files that hold them."""

from __future__ import annotations

import codecs
import io
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from datasets.folder import is_hidden
from datasets.registry import register_dataset
from datasets.rows import SPLITS, source_of_rows, split_called
from datasets.source import Files, Source
from utils.errors import UserError, doing, enumerate_some
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
        splits: one per row, None where nothing says it.
        class_names: what whole numbers in `labels` stand for; None: not known.
    """

    images: list[Path] | pyarrow.ChunkedArray
    labels: list[Any]
    splits: list[str | None]
    class_names: tuple[str, ...] | None = None


class EncodedImages(Files):
    """Encoded images (PNG, JPEG, ...) in a table, decoded when they are asked for.

    Args:
        chunks: of the column of the table, ``large_binary``.
        where: what to call the table in messages.
        labels: the class of each image.
    """

    def __init__(self, chunks: list[pyarrow.Array], where: str, labels: Sequence[int]):
        import pyarrow

        self._column, self._items, self._where = pyarrow.chunked_array(chunks), np.arange(len(labels)), where
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.found = True

    def path(self, index: int) -> str:
        return f"{self._where} row {self._items[index]}"

    def content(self, index: int) -> bytes:
        return self._column[int(self._items[index])].as_py() or b""  # nothing is no image, as other bytes are none


@register_dataset("csv", "parquet")
def table(
    root: Path, val_split: float | None = None, image_column: str | None = None, label_column: str | None = None
) -> Source:
    """The images in a table, or in a folder of tables.

    A table is a text file (``.csv``, ``.tsv``; commas, semicolons or tabs; UTF-8 or UTF-16), or a Parquet or Arrow file
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
    files = _tables_in(root) if root.is_dir() else {root: None}
    _warn_of_missing_parts(files)
    parts = [_read(file, split, image_column, label_column) for file, split in files.items()]
    splits = [split for part in parts for split in part.splits]
    if None in splits and set(splits) != {None}:
        raise UserError(
            f"{root}: says of some images only to which split they belong; name every file train... or val..."
        )
    if len(names := {part.class_names for part in parts}) > 1:
        raise UserError(f"{root}: its files give the classes different names")
    images = [image for part in parts for image in getattr(part.images, "chunks", part.images)]
    is_list = bool(images) and isinstance(images[0], Path)
    make = partial(Files, images, found=False) if is_list else partial(EncodedImages, images, str(root))
    labels = [label for part in parts for label in part.labels]
    with doing(f"reading {root}"):
        return source_of_rows(make, labels, splits, val_split, str(root), class_names=names.pop())


def _warn_of_missing_parts(files: Iterable[Path]) -> None:
    """Hugging Face numbers the parts of a table: ``train-00000-of-00003.parquet``."""
    matches = (re.fullmatch(r"(.*)-\d+-of-(\d+)", str(file.with_suffix(""))) for file in files)
    for (name, wanted), found in Counter(match.groups() for match in matches if match).items():
        if found != int(wanted):
            log.warning("%s: %d of its %d parts are there", name, found, int(wanted))


def _tables_in(folder: Path) -> dict[Path, str | None]:
    """The Parquet and Arrow files below `folder` that are not hidden, or else the text files, and the split of each.

    Raises:
        UserError: there is none, or they are in several folders, so they are several data sets.
    """
    visible = [file for file in sorted(folder.rglob("*")) if not any(map(is_hidden, file.relative_to(folder).parts))]
    for endings in (ARROW, TEXT):
        splits, subsets = {}, set()
        for file in visible:
            if file.suffix.lower() in endings and file.is_file():
                folders = file.relative_to(folder).parts[:-1]
                words = (re.match(r"[a-z]*", file.stem.casefold())[0], *folders)
                splits[file] = next(filter(None, map(split_called, words)), None)
                subsets.add("/".join(name for name in folders if not split_called(name)) or ".")
        if len(subsets) > 1:
            several = enumerate_some(sorted(subsets))
            raise UserError(f"dataset.root: {folder} holds several data sets, {several}; name the folder of one")
        if splits:
            return splits
    raise UserError(f"dataset.root: {folder} holds no {', '.join((*ARROW, *TEXT))} file")


def _known(file: Path, splits: list[Any] | None, of_file: str | None, rows: int) -> list[str | None]:
    """The split of each row: what its column says, else that of the file."""
    if splits is None:
        return [of_file] * rows
    known = {name: split_called(str(name)) for name in set(splits)}
    if unknown := sorted(repr(name) for name, split in known.items() if split is None):
        spellings = ", ".join(name for names in SPLITS.values() for name in names)
        raise UserError(f"{file}: split {enumerate_some(unknown)}, must be one of {spellings}")
    return [known[name] for name in splits]


def _read(file: Path, split: str | None, image_column: str | None, label_column: str | None) -> Rows:
    with doing(f"reading {file}"):
        check_regular(file)
        read = _read_arrow if file.suffix.lower() in ARROW else _read_text
        return read(file, split, image_column, label_column)


def _read_text(file: Path, of_file: str | None, image_column: str | None, label_column: str | None) -> Rows:
    import pandas

    content = file.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252")  # as Excel writes it; a wrong guess shows, because the files are not found
        log.warning("%s: is no UTF-8, so it is read as Windows-1252", file)
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # a line is longer than the first
        separator = max(",;\t", key=text.partition("\n")[0].count)
        rows = pandas.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False, index_col=False)
    image, label, split = _columns(list(rows.columns), image_column, label_column, file)
    paths = [file.parent / path for path in rows[image].fillna("")]
    splits = rows[split].tolist() if split else None
    return Rows(paths, rows[label].tolist(), _known(file, splits, of_file, len(rows)))


def _read_arrow(file: Path, of_file: str | None, image_column: str | None, label_column: str | None) -> Rows:
    import pyarrow
    import pyarrow.compute
    import pyarrow.dataset

    data = _open_arrow(file, ARROW[file.suffix.lower()])
    image, label, split = _columns(data.schema.names, image_column, label_column, file)
    table = data.to_table(columns=[name for name in (image, label, split) if name])
    column = table[image]
    if pyarrow.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = pyarrow.compute.struct_field(column, "bytes")
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        images = [file.parent / (path or "") for path in column.to_pylist()]
    else:
        images = column.cast(pyarrow.large_binary())  # of one type, whichever each file has
    labels = table[label].to_pylist()
    names = _class_names(data.schema, label)
    splits = table[split].to_pylist() if split else None
    return Rows(images, labels, _known(file, splits, of_file, len(labels)), names)


def _open_arrow(file: Path, form: str) -> pyarrow.dataset.Dataset:
    import pyarrow.dataset
    import pyarrow.ipc

    try:
        return pyarrow.dataset.dataset(file, format=form)
    except pyarrow.ArrowInvalid:
        if form != "ipc":
            raise
        with pyarrow.memory_map(str(file)) as stream:  # the form in which Hugging Face's library saves a data set
            return pyarrow.dataset.dataset(pyarrow.ipc.open_stream(stream).read_all())


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
        if wanted not in (None, *names) or (wanted is None and not there):
            raise UserError(
                f"{file}: no column is called {wanted or ' or '.join(usual[:3])}; {key} names one of "
                f"{enumerate_some(names, 20)}"
            )
        if wanted is None and len(there) > 1:
            log.info("%s: %s is the %s, of %s; %s names another", file, there[0], what, ", ".join(there), key)
        found.append(wanted or there[0])
    return (*found, folded.get("split"))
