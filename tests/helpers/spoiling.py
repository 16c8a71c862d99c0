"""Ways to spoil a file: each function gives one that does it to a path."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models import get_model

Spoiling = Callable[[Path], Any]
TRACE = "you-have-been-had"  # the file that appears in the current folder where a file's code is run


class RunsCode:
    """What leaves a `TRACE` when it is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def text(content: str | bytes) -> Spoiling:
    """The file holds something else."""
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


def appended(content: bytes) -> Spoiling:
    """The file goes on with something."""
    return lambda path: path.write_bytes(path.read_bytes() + content)


def cut(end: int) -> Spoiling:
    """The file ends there; from behind if negative."""
    return lambda path: path.write_bytes(path.read_bytes()[:end])


def saved(content: Any) -> Spoiling:
    """The file is a checkpoint of `content`."""
    return lambda path: torch.save(content, path)


def pickled(protocol: int) -> Spoiling:
    """The file is no checkpoint but a bare pickle, of code."""
    return lambda path: path.write_bytes(pickle.dumps(RunsCode(), protocol))


def weights(name: str = "resnet8", classes: int = 2, **entries: Any) -> Spoiling:
    """The file is a checkpoint of a network's weights, with these entries; in their names, two _ stand for a dot."""
    named = {key.replace("__", "."): value for key, value in entries.items()}
    return lambda path: torch.save(get_model(name, classes).state_dict() | named, path)


def instead(put: Callable[[Path], Any]) -> Spoiling:
    """Something else is in the file's place."""
    return lambda path: (path.unlink(missing_ok=True), put(path))


def link(target: str | Path) -> Spoiling:
    return instead(lambda path: path.symlink_to(target))
