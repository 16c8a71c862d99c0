"""Image files in one folder per class: images of your own."""

from __future__ import annotations

import logging
import mimetypes
import os
from functools import partial
from pathlib import Path
from typing import NoReturn

from datasets.registry import register_dataset
from datasets.rows import SPLITS, source_of_rows, split_called
from datasets.source import Files, Source
from utils.errors import UserError, enumerate_some, printable
from utils.files import identity

log = logging.getLogger("sakd")

JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
EXTENSIONS = (*JPEG, ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
SYSTEM = ("@eaDir", "__MACOSX", "Thumbs.db", "desktop.ini")  # what a NAS, archives made on a Mac and Windows leave


@register_dataset("imagefolder")
def imagefolder(root: Path, val_split: float | None = None) -> Source:
    """``<root>/train/<class>/**`` and ``<root>/val/<class>/**``, perhaps ``<root>/test/<class>/**``.

    Sizes and formats may be mixed; see `datasets.rows.SPLITS` for other names of the three. The classes are the
    folders in ``train``, sorted. Without a folder for validation, ``test`` validates, or with `val_split` that share of
    every class in ``train``. ``<root>/<class>/**``, not divided at all, needs `val_split`.

    Raises:
        utils.errors.UserError: a folder is missing, empty or unknown; the line names it.
    """
    if not root.is_dir():
        raise UserError(f"dataset.root: {root} is no folder; {_ADVICE.format(root=root)}")
    parts = _divided(root)
    if not parts and val_split is None:
        raise UserError(f"dataset.root: {root} holds no folders train and val; {_ADVICE.format(root=root)}")
    if "test" in parts and "val" in parts:
        classes, of_test = (set(_visible_folders(parts[split])) for split in ("train", "test"))
        if not classes & of_test:
            log.warning("%s: not sorted into the classes of train, so it is no test split", parts.pop("test"))
    found = {split: scan(folder) for split, folder in (parts or {None: root}).items()}
    return source_of_files(found, val_split, str(root))


_ADVICE = (
    "images belong in {root}/train/<class>/ and {root}/val/<class>/, or in {root}/<class>/ with dataset.val_split=0.1; "
    "dataset=digits needs no files"
)


def source_of_files(found: dict[str | None, list[tuple[str, str]]], val_split: float | None, where: str) -> Source:
    """A data set of the path and class of each image of each split, see `source_of_rows`."""
    paths, labels, splits = zip(*((path, name, split) for split, images in found.items() for path, name in images))
    return source_of_rows(partial(Files, paths), labels, splits, val_split, where, numbers=False)


def is_hidden(name: str) -> bool:
    """Systems and editors put files and folders of such names beside one's own."""
    return name.startswith(".") or name in SYSTEM


def scan(folder: Path) -> list[tuple[str, str]]:
    """Path and class of the images in the class folders of `folder`, at any depth, sorted by class folder and path.

    Images of other endings, and those beside the class folders, are left out, which the log says.

    Raises:
        UserError: `folder` has no class folders, or one without images.
    """
    classes = _visible_folders(folder) if folder.is_dir() else []
    if not classes:
        raise UserError(f"{folder}: holds no class folders; images belong in {folder}/<class>/")
    seen = {identity(above) for above in folder.resolve().parents} | {identity(folder)}
    others = [str(file) for file in sorted(folder.iterdir()) if _is_image(file.name) and file.is_file()]
    found, empty = [], []
    for name in classes:
        images, unsupported = _images_below(folder / name, seen)
        others += unsupported
        found += [(file, name) for file in images]
        empty += [] if images else [name]
    if empty:
        raise UserError(
            f"{folder}: no images of its own in class folder {enumerate_some(empty)}; remove it or put images there "
            f"(looked for {', '.join(EXTENSIONS)}; what two folders link to belongs to the first)"
        )
    _warn_of(others, folder)
    return found


def find_images(path: Path) -> list[str]:
    """The images in a folder, at any depth, sorted by path; or `path` itself if it is a file.

    Images of other endings are left out, which the log says.

    Raises:
        UserError: there is none.
    """
    if path.is_file():
        return [str(path)]
    images, others = _images_below(path, set())
    _warn_of(others, path)
    if not images:
        raise UserError(f"{path}: holds no images ({', '.join(EXTENSIONS)})")
    return images


def _divided(root: Path) -> dict[str | None, Path]:
    """The folders of the splits in `root`, ``train`` first; none if the folders there are classes."""
    found: dict[str | None, Path] = {}
    names = _visible_folders(root)
    for name in names:
        split = split_called(name)
        if split and split in found:
            raise UserError(f"{root}: both {found[split].name} and {name} could be the {split} split; remove one")
        found[split] = root / name
    parts = {split: found[split] for split in SPLITS if split in found}
    if list(parts) == ["train"] and len(names) > 1 and _visible_folders(parts["train"]):
        others = enumerate_some([name for name in names if name != parts["train"].name])
        raise UserError(
            f"{root}: {parts['train'].name} holds class folders, and {others} beside it is of no known name; "
            f"call the folder for validation val, or set dataset.root={parts['train']} and dataset.val_split=0.1"
        )
    return parts if "train" in parts and (len(parts) > 1 or len(names) == 1) else {}


def _visible_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not is_hidden(entry.name))


def _images_below(folder: Path, seen: set[tuple[int, int]]) -> tuple[list[str], list[str]]:
    """The images below `folder`, and what may be images of other formats or endings, each sorted.

    Hidden ones are left out, and folders that are in `seen`, to which the others are added: links may go in a circle.
    """
    images, others = [], []
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        if identity(parent) in seen:
            folders.clear()
            continue
        seen.add(identity(parent))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        files = [os.path.join(parent, name) for name in names if not is_hidden(name)]
        images += filter(_is_image, files)
        kinds = {file: mimetypes.guess_type(file, strict=False)[0] for file in files if not _is_image(file)}
        others += [file for file, kind in kinds.items() if kind is None or kind.startswith("image/")]
    return sorted(images), sorted(others)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not is_hidden(os.path.basename(name))


def _warn_of(others: list[str], folder: Path) -> None:
    if others:
        count, first = len(others), printable(others[0])
        log.warning("%s: files of no supported format or in no class skipped: %d, the first: %s", folder, count, first)


def _raise(error: OSError) -> NoReturn:
    raise error
