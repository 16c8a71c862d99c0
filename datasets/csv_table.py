"""Images listed in a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from datasets.registry import register_dataset
from datasets.rows import source_of_rows
from datasets.source import Files, Source
from utils.errors import UserError, reason
from utils.files import check_regular


@register_dataset("csv")
def csv_table(root: Path, val_split: float | None = None) -> Source:
    """The images that the CSV file `root` lists in its columns ``path``, ``label`` and perhaps ``split``.

    Paths are relative to the folder of the file. Labels may be words or numbers. Without a column ``split``,
    `val_split` says which share of every class validates.

    Raises:
        UserError: the file cannot be read, or lacks something; the line names it.
    """
    try:
        check_regular(root)
        with open(root, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            columns = reader.fieldnames or []
            rows = [(reader.line_num, row) for row in reader]
    except UnicodeDecodeError as error:
        raise UserError(f"dataset.root: {root}: is not UTF-8 text ({reason(error)}); save it as UTF-8") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"dataset.root: {root}: cannot be read as a CSV file ({reason(error)})") from error
    for name in ("path", "label"):
        if name not in columns:
            raise UserError(
                f"{root}: has no column {name}; the first line must be path,label or path,label,split, and is "
                f"{','.join(columns)[:60]!r}"
            )
    for line, row in rows:
        if None in row.values() or None in row:
            raise UserError(f"{root}: line {line} has another number of fields than the first line")
        if not row["path"] or not row["label"]:
            raise UserError(f"{root}: line {line} has no {'label' if row['path'] else 'path'}")
    paths = [root.parent / row["path"] for _, row in rows]
    return source_of_rows(
        [row["label"] for _, row in rows],
        [row["split"] for _, row in rows] if "split" in columns else None,
        lambda picked, labels: Files([paths[k] for k in picked], labels, seen=False),
        val_split,
        str(root),
    )
