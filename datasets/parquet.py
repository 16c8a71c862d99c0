"""Images in a table: Parquet or Arrow files, as data hubs have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from datasets.folders import VALIDATION
from datasets.images import open_rgb
from datasets.registry import register_dataset
from datasets.rows import source_of_rows
from datasets.source import Source
from utils.errors import UserError, reason
from utils.files import check_regular

if TYPE_CHECKING:
    import pyarrow

FORMATS = {".parquet": "parquet", ".arrow": "ipc", ".feather": "ipc"}


class EncodedImages:
    """Encoded images (PNG, JPEG, ...) in a table, decoded when they are asked for.

    Args:
        table: the whole table.
        rows: which of its rows belong here.
        labels: the class of each.
        where: what to call the table in messages.

    Attributes:
        labels: int64 ``[N]``.
    """

    def __init__(self, table: pyarrow.ChunkedArray, rows: Sequence[int], labels: Sequence[int], where: str):
        self._table, self._rows, self._where = table, list(rows), where
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Where image `index` lies."""
        return f"{self._where} row {self._rows[index]}"

    def subset(self, index: Sequence[int]) -> EncodedImages:
        """These of the images, in this order."""
        return EncodedImages(
            self._table, [self._rows[i] for i in index], self.labels[list(index)].tolist(), self._where
        )

    def picture(self, index: int) -> Image.Image:
        """Image `index`, in RGB.

        Raises:
            utils.errors.UserError: its bytes are no image.
        """
        return open_rgb(self.path(index), self._table[self._rows[index]].as_py())


@register_dataset("parquet")
def parquet(root: Path, val_split: float | None = None) -> Source:
    """The images in a Parquet or Arrow (``.arrow``, ``.feather``) file, or in a folder of such files.

    Columns: ``image``, the bytes of an image file, or a struct with a field ``bytes``; ``label``, a word or a number;
    perhaps ``split``. Of a folder, files named ``train*`` are trained on and files named ``val*`` or ``test*``
    validate. Otherwise `val_split` says which share of every class validates.

    Raises:
        UserError: pyarrow is not installed, or something is missing; the line names it.
    """
    try:
        import pyarrow
    except ImportError:
        raise UserError("dataset: parquet needs pyarrow; pip install pyarrow") from None
    files = sorted(file for file in root.rglob("*") if file.suffix in FORMATS) if root.is_dir() else [root]
    if not files:
        raise UserError(f"dataset.root: {root} holds no {', '.join(FORMATS)} file")
    tables = [_read(file) for file in files]
    splits = [split for file, table in zip(files, tables) for split in _splits(file, table, in_folder=root.is_dir())]
    images = pyarrow.chunked_array([chunk for table in tables for chunk in table["image"].chunks])
    return source_of_rows(
        [label for table in tables for label in table["label"].to_pylist()],
        None if None in splits else splits,
        lambda rows, labels: EncodedImages(images, rows, labels, str(root)),
        val_split,
        str(root),
    )


def _read(file: Path) -> pyarrow.Table:
    """The columns that matter, the image as bytes."""
    import pyarrow
    import pyarrow.compute
    import pyarrow.dataset

    if file.suffix not in FORMATS:
        raise UserError(f"dataset.root: {file}: expected a folder or a file that ends in {', '.join(FORMATS)}")
    try:
        check_regular(file)
        data = pyarrow.dataset.dataset(file, format=FORMATS[file.suffix])
        for name in ("image", "label"):
            if name not in data.schema.names:
                raise UserError(f"{file}: has no column {name}, only {', '.join(data.schema.names)}")
        table = data.to_table(columns=[name for name in ("image", "label", "split") if name in data.schema.names])
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot be read as a table ({reason(error)})") from error
    image = table["image"]
    if pyarrow.types.is_struct(image.type) and "bytes" in [field.name for field in image.type]:
        image = pyarrow.compute.struct_field(image, "bytes")
    if not (pyarrow.types.is_binary(image.type) or pyarrow.types.is_large_binary(image.type)):
        raise UserError(f"{file}: column image is {image.type}, expected the bytes of image files")
    columns = {"image": image.cast(pyarrow.large_binary())}  # of one type, whichever each file has
    for name in table.schema.names[1:]:
        column = table[name]
        columns[name] = column.cast(column.type.value_type) if pyarrow.types.is_dictionary(column.type) else column
    label = columns["label"].type
    if not (pyarrow.types.is_integer(label) or pyarrow.types.is_string(label) or pyarrow.types.is_large_string(label)):
        raise UserError(f"{file}: column label is {label}, expected words or whole numbers")
    for name, column in columns.items():
        if column.null_count:
            raise UserError(f"{file}: column {name} is empty in {column.null_count} rows")
    return pyarrow.table(columns)


def _splits(file: Path, table: pyarrow.Table, *, in_folder: bool) -> list[str | None]:
    """The split of each row: that of its column, or of the file's name."""
    if "split" in table.schema.names:
        return table["split"].to_pylist()
    names = ("train", *VALIDATION) if in_folder else ()
    return [next((name for name in names if file.stem.startswith(name)), None)] * len(table)
