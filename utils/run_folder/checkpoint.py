"""Writing checkpoints so that none is ever lost, and reading them without running what they may contain."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import safetensors.torch
import torch

from utils.errors import UserError, exhausted_memory, reason
from utils.files import check_regular, replacing
from utils.run_folder.layout import Layout

# Accuracies in published checkpoints are often NumPy's scalars, of either name of its core. They run no code.
_scalar = numpy.float64().__reduce__()[0]
_HARMLESS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    numpy.dtype,
    *(type(numpy.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")),
]
_REBUILDING = {
    (function.__module__, function.__name__): function
    for function in (
        OrderedDict,
        torch._utils._rebuild_tensor,
        torch._utils._rebuild_tensor_v2,
        torch._utils._rebuild_parameter,
    )
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


def read_checkpoint(path: Path, *, leave_out_objects: bool = False) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may contain.

    Args:
        path: the file.
        leave_out_objects: read a file that holds objects other than tensors and plain values without them, see
            `LeftOut`, instead of refusing it.

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if (inside := Layout(path).best).exists():
        raise UserError(f"{path}: is a folder, expected a file; {inside} is one")
    check_regular(path)
    try:
        if path.suffix == ".safetensors":
            content = safetensors.torch.load(path.read_bytes())
        else:
            content = _read_pickle(path, leave_out_objects)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_what_is_wrong(error)}") from error
    except Exception as error:  # on bytes that are no pickle at all the unpickler may raise anything
        if exhausted_memory(error):
            raise
        problem = f"{reason(error)}, it may be cut off" if path.stat().st_size else "the file is empty"
        raise UserError(f"{path}: not a readable checkpoint ({problem})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


class LeftOut(dict):
    """Stands for an object of a class that no checkpoint needs; no code of that class runs.

    Of a dict it keeps the entries, of a module the parameters, the persistent buffers and the parts.
    """

    dump_patches = False  # torch.load asks modules in files of the old format

    def __new__(cls, *arguments: Any) -> LeftOut:
        return super().__new__(cls)

    def __init__(self, *arguments: Any):
        super().__init__()

    def __call__(self, *arguments: Any) -> LeftOut:
        return self

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict) and "_modules" in state:
            for name in ("_parameters", "_buffers", "_modules"):
                self.update(state.get(name, {}))
            for name in state.get("_non_persistent_buffers_set", ()):
                self.pop(name, None)

    def append(self, item: Any) -> None:
        """An object that is filled as a list is."""

    def extend(self, items: Any) -> None:
        """The same."""


class _Unpickler(pickle.Unpickler):
    """Knows how to rebuild tensors, and takes every other name for `LeftOut`."""

    def find_class(self, module: str, name: str) -> Any:
        return _REBUILDING.get((module, name), LeftOut)


# What `torch.load` expects of a module such as `pickle`.
_leaving_out = SimpleNamespace(
    Unpickler=_Unpickler, load=lambda file, **options: _Unpickler(file, **options).load(), __name__="leaving_out"
)


def _read_pickle(path: Path, leave_out_objects: bool) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
        warnings.simplefilter("ignore")  # about old formats
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:
            if not leave_out_objects:
                raise
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_leaving_out)


def _what_is_wrong(error: pickle.UnpicklingError) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    found = f"it holds {code[1]}" if code else "it is damaged, or holds more"
    return f"{found}; expected nothing but tensors and plain values, which cannot run code"
