"""A network's weights out of a checkpoint: ours, those of the published code, or anybody's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.staged import StagedModel
from utils.errors import UserError
from utils.run_folder.checkpoint import read_checkpoint

WEIGHT_KEYS = ("model", "state_dict", "net")  # where the checkpoints in circulation keep a network's weights
COUNTERS = "num_batches_tracked"  # of BatchNorm; files from before PyTorch 0.4.1 lack them
MOST_DROPPED = 5  # entries in a suggested command
MOST_LEVELS, MOST_ENTRIES = 20, 100_000  # of mappings within mappings that are looked at
_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+")  # what data parallelism and compilation put before a key

EMA_HELP = "take the moving average of the weights, which training.ema_decay keeps"

Shapes = dict[str, tuple[int, ...]]


def select_weights(content: dict[Any, Any], path: Path, prefix: str = "", drop: Sequence[str] = ()) -> dict[str, Any]:
    """The entries of one network's state_dict in any of the common kinds of file.

    These are our own checkpoints, those of the published code and of the classic CIFAR KD benchmarks (weights under
    ``model``), bare state_dicts, and safetensors.

    Args:
        content: what `read_checkpoint` gave.
        path: the file, for messages.
        prefix: take the entries whose names begin so, and take it off. The name of an entry of a mapping within another
            one begins with the mapping's own name and a dot.
        drop: names to leave out, with all below them.

    Returns:
        the entries without the prefixes that wrappers put before every name.

    Raises:
        UserError: there is nothing with that prefix or of that name, or a name occurs twice.
    """
    weights = _flattened(_weights_within(content))
    found = _below(prefix, weights) or _below(prefix, _flattened(content))
    if prefix and not found:
        first = ", ".join(dict.fromkeys(key.partition(".")[0] for key in weights))
        raise UserError(f"{path}: no entry begins with {prefix!r}; they begin with {first[:200] or 'nothing'}")
    found = _unwrapped(found, path)
    for name in drop:
        kept = {key: value for key, value in found.items() if not f"{key}.".startswith(f"{name}.")}
        if len(kept) == len(found):
            raise UserError(f"{path}: no entry is called {name!r}, or begins with {name + '.'!r}")
        found = kept
    return found


def average_instead(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """`content` with the moving average of the student's weights in the place of the weights.

    Raises:
        UserError: there is none.
    """
    if not isinstance(content.get("ema"), dict):
        raise UserError(f"{path}: holds no moving average of weights; training.ema_decay=0.999 would have kept one")
    return content | {"model": content["ema"]}


def load_weights(
    model: StagedModel,
    path: Path,
    *,
    new_head: bool = False,
    name: str = "the model",
    import_options: Sequence[str] = (),
    check: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Load a network's weights from a file, see `select_weights`; everything must match.

    Args:
        model: the network; changed only if everything matches.
        path: the file.
        new_head: keep the classifier (last stage) of `model` as it is, whatever the file has there.
        name: what to call the model in messages.
        import_options: options of ``python -m utils.convert import`` that stand for `model`.
        check: called with the content of the file before its weights are looked at.

    Raises:
        UserError: the file does not hold this network's weights; the line says what was expected and found, and which
            command extracts them if they are in the file in another form.
    """

    @contextmanager
    def naming_command() -> Iterator[None]:
        try:
            yield
        except UserError as error:
            command = import_command(path, model, name, import_options, new_head=new_head) if import_options else None
            if command is None:
                raise
            raise UserError(f"{error}; this makes a file that can be loaded: {command}") from error

    with naming_command():
        content = read_checkpoint(path)
    if check is not None:
        check(content)
    with naming_command():
        weights = select_weights(content, path)
        assign_weights(model, weights, f"{path}: not the weights of {name}", new_head=new_head)


def assign_weights(model: StagedModel, weights: dict[str, Any], complaint: str, *, new_head: bool = False) -> None:
    """Load what `select_weights` gave, which may be from before BatchNorm counted batches.

    Raises:
        UserError: it does not match; the line begins with `complaint`.
    """
    weights = _completed(weights, model, new_head)
    _check_weights(weights, model.state_dict(), complaint)
    model.load_state_dict(weights)


def head_keys(model: StagedModel) -> set[str]:
    """state_dict keys of the classifier, the last stage."""
    owned = {id(tensor) for tensor in model.stage_tensors(-1)}
    return {key for key, value in model.state_dict(keep_vars=True).items() if id(value) in owned}


def import_command(
    path: Path, model: StagedModel, name: str, options: Sequence[str], *, new_head: bool = False
) -> str | None:
    """The command that makes a file for `load_weights` of `path` if the weights of `model` are in there, else None.

    Args:
        path, name, new_head: as of `load_weights`.
        model: the network whose weights are looked for.
        options: those that stand for `model`.
    """
    with suppress(UserError):
        content = read_checkpoint(path, leave_out_objects=True)
        # Of a teacher and a student in one file, first the one that the message speaks of.
        for prefix in sorted(_prefixes(content, model), key=lambda text: text.removesuffix(".") not in name.split()):
            drop = _fitting(content, path, prefix, model, new_head)
            if drop is not None:
                words = [*options, *(["--prefix", prefix] if prefix else [])]
                words += [word for key in drop for word in ("--drop", key)]
                out = path.with_name(f"{path.stem}-imported.pth")
                return shlex.join(["python", "-m", "utils.convert", "import", str(path), str(out), *words])
    return None


def in_order(weights: dict[str, Tensor], model: StagedModel) -> dict[str, Tensor] | None:
    """`weights` under the names of `model`, if the names differ but the shapes, one after another, do not."""
    found, expected = shapes(weights), shapes(model.state_dict())
    if found.keys() == expected.keys() or list(found.values()) != list(expected.values()):
        return None
    return {ours: weights[theirs] for ours, theirs in zip(expected, found)}


def shapes(weights: dict[str, Tensor]) -> Shapes:
    """Shape of every entry; what only counts batches is left out."""
    return {key: tuple(value.shape) for key, value in weights.items() if not key.endswith(COUNTERS)}


def not_plain(tensor: Tensor) -> str | None:
    """What is unusual about how `tensor` is stored, or None."""
    if tensor.layout != torch.strided or tensor.device.type == "meta" or tensor.is_quantized:
        return f"{tensor.dtype}, {tensor.layout} on {tensor.device}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{tuple(tensor.shape)} expanded from fewer values"
    return None


def _weights_within(content: dict[Any, Any]) -> dict[Any, Any]:
    return next((content[key] for key in WEIGHT_KEYS if isinstance(content.get(key), dict)), content)


def _flattened(mapping: dict[Any, Any]) -> dict[str, Any]:
    """Entries of mappings within mappings under dotted names. Bounded, for a mapping may hold itself."""
    entries = islice(_walk(mapping, "", MOST_LEVELS), MOST_ENTRIES)
    return {
        key: value for key, value in entries if not isinstance(value, dict) or value
    }  # such as a module without parameters


def _walk(mapping: dict[Any, Any], prefix: str, levels: int) -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, dict) and value and levels:
            yield from _walk(value, f"{prefix}{key}.", levels - 1)
        elif value is not None:  # stands in a module for a bias that it does not have
            yield f"{prefix}{key}", value


def _below(prefix: str, entries: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _unwrapped(entries: dict[str, Any], path: Path) -> dict[str, Any]:
    originals: dict[str, str] = {}
    for key in entries:
        bare = _WRAPPERS.sub("", key)
        if bare in originals:
            raise UserError(f"{path}: holds two entries for one, {originals[bare]} and {key}")
        originals[bare] = key
    return {bare: entries[key] for bare, key in originals.items()}


def _prefixes(content: dict[Any, Any], model: StagedModel) -> list[str]:
    """What stands before the name of the model's first entry, wherever that occurs."""
    first = next(iter(model.state_dict()))
    keys = [*_flattened(_weights_within(content)), *_flattened(content)]
    return list(dict.fromkeys(["", *(key.removesuffix(first) for key in keys if key.endswith(f".{first}"))]))


def _fitting(content: dict, path: Path, prefix: str, model: StagedModel, new_head: bool) -> list[str] | None:
    """What to drop from the entries below `prefix` to leave the weights of `model`; None: they are not there."""
    expected = model.state_dict()
    parts = {key.partition(".")[0] for key in expected}
    try:
        weights = select_weights(content, path, prefix)
        unknown = [key for key in weights if key not in expected]
        drop = dict.fromkeys(key if key.partition(".")[0] in parts else key.partition(".")[0] for key in unknown)
        if len(unknown) == len(weights) and all(isinstance(value, Tensor) for value in weights.values()):
            weights, drop = in_order(weights, model) or {}, {}
        weights = {key: value for key, value in weights.items() if key in expected}
        _check_weights(_completed(weights, model, new_head), expected, "")
    except UserError:
        return None
    return list(drop) if len(drop) <= MOST_DROPPED else None


def _completed(weights: dict[str, Any], model: StagedModel, new_head: bool) -> dict[str, Any]:
    """`weights` with the model's own head, if it is to have a new one, and with its counters where there are none."""
    expected, head = model.state_dict(), head_keys(model) if new_head else set()
    own = {key: value for key, value in expected.items() if key in head}
    counters = {key: value for key, value in expected.items() if key.endswith(COUNTERS)}
    return counters | weights | own


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
    kinds = [(tensor.is_floating_point(), tensor.is_complex()) for tensor in (found, expected)]
    if (unusual := not_plain(found)) or kinds[0] != kinds[1]:
        return f"is {unusual or found.dtype}, expected plain {expected.dtype}"
    if found.is_floating_point() and not torch.isfinite(found).all():
        return "holds NaN or infinite values"
    return None


def _sample(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
