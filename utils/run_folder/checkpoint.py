"""Writing checkpoints so that none is ever lost, and reading them without running what they may contain."""

from __future__ import annotations

import pickle
import pickletools
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch

from utils.errors import UserError, doing, reason
from utils.files import check_regular, replacing
from utils.run_folder.layout import Layout

# Accuracies in published checkpoints are often NumPy's scalars, of either name of its core. They run no code.
_scalar = numpy.float64().__reduce__()[0]
_dtypes = {type(numpy.dtype(code)) for code in numpy.typecodes["AllInteger"] + numpy.typecodes["AllFloat"] + "?"}
_HARMLESS = {
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "numpy.dtype": numpy.dtype,
    **{f"numpy.dtypes.{kind.__name__}": kind for kind in _dtypes},
}

_ZIP = b"PK\x03\x04"  # how files of PyTorch begin
_SIGNATURES = {
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; `git lfs pull` fetches that",
    b"<": "an HTML or XML page; a download gave this page in place of the file",
    b"\x1f\x8b": "a gzip archive; unpack it first",
}


def save_atomically(state: dict[str, Any], path: Path, also: Sequence[Path] = ()) -> None:
    """Write `state` so that a reader finds the old file or the new one, whole, whatever happens meanwhile.

    Args:
        state: what to write.
        path: the file.
        also: further names for it, see `utils.files.replacing`.

    Raises:
        UserError: the disk is full or not writable; the old file is still there.
    """
    try:
        with replacing(path, also) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:
        # torch turns a failed write into a RuntimeError about its own bookkeeping; the cause is in its context.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        kept = "; the one before it is kept" if path.exists() else ""
        raise UserError(f"{path}: cannot write the checkpoint ({reason(cause)}){kept}") from error


def checkpoint_file(path: Path) -> Path:
    """The file that a path stands for: of a run's folder, its best checkpoint."""
    best = Layout(path).best
    return best if best.exists() else path


def is_ours(content: dict[Any, Any]) -> bool:
    """Whether a checkpoint is one that a run of this project wrote, or `utils.convert`."""
    return "format" in content and "model" in content


def read_checkpoint(path: Path) -> dict[Any, Any]:
    """Read a checkpoint in PyTorch's format or as safetensors, whatever its name ends in. Nothing in it is executed.

    Objects of classes that PyTorch does not count as safe are read as their attributes and entries alone, see
    `_Attributes`: hyperparameters, callbacks, whole networks.

    Args:
        path: the file, or a run's folder, see `checkpoint_file`.

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    with doing(f"reading {path}"):
        path = checkpoint_file(path)
        check_regular(path)
        with path.open("rb") as file:
            start = file.read(64)
        # A file of safetensors begins with the length of a JSON header, whose bytes may look like text, and the header.
        is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
        if not is_safetensors and (kind := _other_kind(path, start)):
            raise UserError(f"{path}: is {kind}")
        content = safetensors.torch.load_file(path) if is_safetensors else _read_pickle(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


class _Attributes:
    """Stand-in for a class or function of others: gives an ordered dictionary, whose ``vars`` are the attributes.

    PyTorch's reader sets entries and attributes of no other type, and it accepts `dict` subclasses by no other way.
    """

    def __new__(cls, *_: Any) -> OrderedDict:
        return OrderedDict()


class _Nothing:
    """Stand-in for what is built from a state that is no dictionary."""

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        """Drop it."""


class _List:
    """Stand-in for what is filled as a list is."""

    def __new__(cls, *_: Any) -> list:
        return []


_STAND_INS = {
    "collections.deque": _List,
    "functools.partial": _Nothing,
    "numpy.core.multiarray._reconstruct": _Nothing,
    "numpy._core.multiarray._reconstruct": _Nothing,
}


def _read_pickle(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about old formats
        try:
            names = [name for name in _unsafe_names(path) if name not in _HARMLESS]
            known = {name: _STAND_INS.get(name, _Attributes) for name in names} | _HARMLESS
            allowed = torch.serialization.safe_globals([(value, name) for name, value in known.items()])
            with allowed, path.open("rb") as file:  # by its path, PyTorch would go by what the name ends in
                return torch.load(file, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, ValueError) as error:  # advice to load it unsafely; or it is no pickle
            code = re.search(r"GLOBAL (\S+)", str(error))
            found = f"it holds {code[1]}" if code else "it is damaged, of another kind, or holds other objects"
            raise UserError(
                f"{path}: refused, {found}; expected tensors and plain values, which cannot run code"
            ) from error


def _unsafe_names(path: Path) -> list[str]:
    """The classes and functions named in a file of PyTorch's, apart from those that rebuild tensors."""
    with path.open("rb") as file:
        if file.peek().startswith(_ZIP):
            return torch.serialization.get_unsafe_globals_in_checkpoint(file)
        # The format before PyTorch 1.6: three short pickles, then the content.
        operations = [operation for _ in range(4) for operation in pickletools.genops(file)]
    names = (str(argument) for code, argument, _ in operations if code.name == "GLOBAL")
    return [name.replace("__builtin__ ", "builtins ").replace(" ", ".") for name in names]


def _other_kind(path: Path, start: bytes) -> str | None:
    """The kind of a file that is no checkpoint; None for one that may be."""
    for signature, kind in _SIGNATURES.items():
        if start.lstrip(b" \t\r\n\xef\xbb\xbf").startswith(signature):
            return kind
    if start.startswith(_ZIP):
        if not zipfile.is_zipfile(path):
            return "cut off; its end is missing"
        with zipfile.ZipFile(path) as archive:
            if any("/code/" in name for name in archive.namelist()):
                return "a TorchScript program; torch.jit.load(FILE).state_dict() has its weights"
            ours = any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
        return None if ours else "a zip archive, and no file that PyTorch has written; unpack it first"
    return None
