"""Writing checkpoints so that none is ever lost, and reading other people's weights."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import safetensors.torch
import torch
from torch import Tensor

from models.staged import StagedModel
from utils.errors import UserError, reason
from utils.files import replacing

WEIGHT_KEYS = ("model", "state_dict", "net")  # where the checkpoints in circulation keep a network's weights
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # what data parallelism and compilation put before a key

# Accuracies in published checkpoints are often NumPy's scalars, of either name of its core. They run no code.
_scalar = numpy.float64().__reduce__()[0]
_HARMLESS = [
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
    numpy.dtype,
    *(type(numpy.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64")),
]


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
        raise UserError(f"{path}: cannot write the checkpoint ({reason(cause)}); the one before it is kept") from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint without running any code that it may contain.

    Raises:
        UserError: there is no such file, or it is no checkpoint.
    """
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint")
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a checkpoint file")
    try:
        content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused, {_what_is_wrong(error)}") from error
    except Exception as error:  # on bytes that are no pickle at all the unpickler may raise anything
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dictionary of weights")
    return content


def _read_pickle(path: Path) -> Any:
    with warnings.catch_warnings(), torch.serialization.safe_globals(_HARMLESS):
        warnings.simplefilter("ignore")  # about old formats
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    return safetensors.torch.load(path.read_bytes())


def _what_is_wrong(error: pickle.UnpicklingError) -> str:
    code = re.search(r"GLOBAL (\S+)", str(error))
    found = f"it holds {code[1]}" if code else "it is damaged, or holds more"
    return f"{found}; expected nothing but tensors and plain values, which cannot run code"


def read_weights(path: Path) -> dict[str, Any]:
    """The entries of a network's state_dict, from any of the common kinds of file.

    These are our own checkpoints, those of the published code and of the classic CIFAR KD benchmarks (weights under
    ``model``), bare state_dicts, and safetensors; prefixes that wrappers put before every key are taken off.

    Raises:
        UserError: see `read_checkpoint`.
    """
    return weights_of(read_checkpoint(path))


def weights_of(content: dict[str, Any]) -> dict[str, Any]:
    """Those in what `read_checkpoint` gave, see `read_weights`."""
    weights = next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)
    return {_WRAPPERS.sub("", str(key)): value for key, value in weights.items()}


def load_weights(model: StagedModel, path: Path, *, new_head: bool = False, name: str = "the model") -> None:
    """Load a network's weights from a file, see `read_weights`; everything must match.

    Args:
        model: the network; changed only if everything matches.
        path: the file.
        new_head: keep the classifier (last stage) of `model` as it is, whatever the file has there.
        name: what to call the model in messages.

    Raises:
        UserError: the file does not hold this network's weights; the line says what was expected and found.
    """
    assign_weights(model, read_weights(path), f"{path}: not the weights of {name}", new_head=new_head)


def assign_weights(model: StagedModel, weights: dict[str, Any], complaint: str, *, new_head: bool = False) -> None:
    """Load what `read_weights` gave, which may be from before BatchNorm counted batches.

    Raises:
        UserError: it does not match; the line begins with `complaint`.
    """
    expected = model.state_dict()
    head = head_keys(model) if new_head else set()
    weights = {key: value for key, value in weights.items() if key not in head}
    for key in expected:
        if key in head or (key.endswith("num_batches_tracked") and key not in weights):
            weights[key] = expected[key]
    _check_weights(weights, expected, complaint)
    model.load_state_dict(weights)


def head_keys(model: StagedModel) -> set[str]:
    """state_dict keys of the classifier, the last stage."""
    owned = {
        id(t)
        for step in model.stages()[-1]
        if isinstance(step, torch.nn.Module)
        for t in step.state_dict(keep_vars=True).values()
    }
    return {key for key, value in model.state_dict(keep_vars=True).items() if id(value) in owned}


def _check_weights(weights: dict[str, Any], expected: dict[str, Tensor], complaint: str) -> None:
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    if missing or unknown:
        found = f"lacks {_sample(missing)}" if missing else f"has the unknown {_sample(unknown)}"
        raise UserError(f"{complaint}: expected {len(expected)} entries, the file {found}")
    for key, value in expected.items():
        if problem := _mismatch(weights[key], value):
            raise UserError(f"{complaint}: {key} {problem}")


def _mismatch(found: Any, expected: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"is a {type(found).__name__}, expected a tensor"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    kinds = [(t.is_floating_point(), t.is_complex(), t.layout, t.device.type == "meta") for t in (found, expected)]
    if kinds[0] != kinds[1]:
        return f"is {found.dtype}, {found.layout} on {found.device}, expected plain {expected.dtype}"
    if found.is_floating_point() and not torch.isfinite(found).all():
        return "holds NaN or infinite values"
    return None


def _sample(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
