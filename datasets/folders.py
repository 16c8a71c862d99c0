"""Image files in one folder per class."""

from __future__ import annotations

import logging
import mimetypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from datasets.source import Files
from utils.errors import UserError
from utils.files import identity

log = logging.getLogger("sakd")

VALIDATION = ("val", "valid", "validation", "test")  # spellings of the split that is not trained on
JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
EXTENSIONS = (*JPEG, ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")


def find_folder(root: Path, names: Sequence[str]) -> Path:
    """The first of `names` that is a folder in `root`.

    Raises:
        UserError: `root` or all of them are missing.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    known = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    problem = f"{root} holds no folder {known}" if root.is_dir() else f"{root} is no folder"
    raise UserError(
        f"dataset.root: {problem}; images belong in {root / names[0]}/<class>/, "
        "or use dataset=digits, which needs no files"
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """Names of the class folders in `folder`, sorted; hidden ones do not count.

    Raises:
        UserError: there is none.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise UserError(f"{folder}: holds no class folders; images belong in {folder}/<class>/")
    return tuple(names)


def scan(folder: Path, classes: Sequence[str]) -> Files:
    """The images in the class folders of `folder`, at any depth, class by class and sorted by path.

    Images of other endings are left out, which the log says.

    Args:
        folder: holds one folder per class.
        classes: all known classes, in the order of their labels; `folder` may lack some.

    Raises:
        UserError: `folder` has no class folders, an unknown one, or one without images.
    """
    present = class_names(folder)
    if unknown := sorted(set(present) - set(classes)):
        raise UserError(f"{folder}: no training images of class {enumerate_some(unknown)}")
    label_of = {name: label for label, name in enumerate(classes)}
    paths: list[str] = []
    labels: list[int] = []
    empty, others = [], []
    visited = {identity(place) for place in (folder, *folder.resolve().parents)}
    for name in present:
        if identity(folder / name) in visited:
            raise UserError(f"{folder / name}: leads to another class folder, or to a folder above it")
        visited.add(identity(folder / name))
    for name in present:
        files = sorted(_files(folder / name, visited))
        found = [file for file in files if file.lower().endswith(EXTENSIONS)]
        others += [file for file in files if not file.lower().endswith(EXTENSIONS) and _is_image(file)]
        paths += found
        labels += [label_of[name]] * len(found)
        if not found:
            empty.append(name)
    if empty:
        raise UserError(
            f"{folder}: no images in class folder {enumerate_some(empty)} (looked for {', '.join(EXTENSIONS)})"
        )
    if others:
        log.warning("%s: %d images of other formats are left out, the first: %s", folder, len(others), others[0])
    return Files(paths, labels)


def enumerate_some(names: Sequence[str], limit: int = 5) -> str:
    """``a, b, c``, or the first few and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _files(folder: Path, visited: set[tuple[int, int]]) -> Iterator[str]:
    """The files below `folder` that are not hidden.

    Folders in `visited` are left out, and those that are entered are added to it.
    """
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        unvisited = {identity(os.path.join(parent, name)): name for name in sorted(folders)}
        folders[:] = [name for identity, name in unvisited.items() if identity not in visited]
        visited.update(unvisited)
        for name in names:
            # Archives made on a Mac hold a hidden twin (._name.jpg) of every file.
            if not name.startswith("."):
                yield os.path.join(parent, name)


def _is_image(file: str) -> bool:
    """Whether the ending is that of some image, as far as Python and the system know."""
    return (mimetypes.guess_type(file, strict=False)[0] or "").startswith("image/")


def _raise(error: OSError) -> NoReturn:
    raise error
