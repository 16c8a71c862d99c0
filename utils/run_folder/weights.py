"""Find a network's weights in a file of any project, under any key and prefix, or refuse the file."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.staged import StagedModel, copy_in_mode
from utils.errors import UserError, doing
from utils.run_folder.checkpoint import is_ours, read_checkpoint

log = logging.getLogger("sakd")

COUNTERS = "num_batches_tracked"  # of BatchNorm; files from before PyTorch 0.4.1 lack them
AVERAGES = ("state_dict_ema.", "model_ema.")  # moving averages, which timm's own loader takes first too
# BatchNorm has four tensors of one shape; every network calls them so, whatever it calls its layers.
BATCHNORM_NAMES = {"weight", "bias", "running_mean", "running_var"}

EMA_HELP = "take the moving average of the weights, which training.ema_decay keeps"


def load_weights(model: StagedModel, path: Path, what: str = "the model", **how: Any) -> None:
    """Load a network's weights from a file; see `take_weights` for the arguments and errors."""
    take_weights(model, read_checkpoint(path), path, what, **how)


def take_weights(
    model: StagedModel,
    content: dict[Any, Any],
    path: Path,
    what: str = "the model",
    *,
    prefix: str | None = None,
    new_head: bool = False,
    key: str = "checkpoint_prefix",
) -> None:
    """Load a network's weights from what `read_checkpoint` gave, and log what was taken.

    Args:
        model: the network; changed only if everything matches.
        content: of the file.
        path: the file, for messages.
        what: how messages call the network. If a teacher and a student fit, the word in it chooses.
        prefix: take the entries whose names begin so; None: those that fit.
        new_head: keep the classifier (last stage) of `model` as it is, whatever the file has there.
        key: the config key that sets `prefix`, for messages.

    Raises:
        UserError: no set of entries fits, or several do.
    """
    with doing(f"{path}: loading the weights of {what}"):
        head = head_keys(model) if new_head else set()
        weights, taken = find_weights(model, content, path, what, prefix=prefix, head=head, key=key)
        assign_weights(model, weights, f"{path}: not the weights of {what}", new_head=new_head)
    if not is_ours(content):
        log.info(f"{what}: weights of {path}, {taken}")


def find_weights(
    model: nn.Module,
    content: dict[Any, Any],
    path: Path,
    what: str = "the model",
    *,
    prefix: str | None = None,
    head: set[str] = frozenset(),
    key: str = "checkpoint_prefix",
) -> tuple[dict[str, Any], str]:
    """Find the one set of entries that fits a network; see `take_weights` for most arguments.

    A set has every name of the network behind one prefix, or else its shapes, in their order.

    Args:
        head: names of the network's entries that need not fit.

    Returns:
        the entries under the network's names, and what was taken, in words.

    Raises:
        UserError: no set fits, or several do and nothing says which is meant.
    """
    if is_ours(content):
        content = {"model": content["model"]}
    expected, entries = model.state_dict(), flattened(content)
    candidates = _by_name(entries, expected, head) or {"": entries}
    problems = {prefix: _problem(_completed(found, expected, head), expected) for prefix, found in candidates.items()}
    by_name = {prefix: found for prefix, found in candidates.items() if problems[prefix] is None}
    fitting = by_name or _by_order(entries, expected, head)
    chosen = _chosen(list(fitting), what, prefix)
    if not chosen:
        problem = f"none of those that fit is under {prefix!r}" if fitting else next(iter(problems.values()))
        raise UserError(f"{path}: not the weights of {what}: {problem}")
    averages = [found for found in chosen if found.startswith(AVERAGES)]
    others = [found.rstrip(".") or "." for found in chosen if found not in averages]
    if len(averages) == len(others) == 1 and prefix is None:
        chosen = averages
    if len(chosen) > 1:
        names = ", ".join(found.rstrip(".") or "." for found in chosen)
        raise UserError(f"{path}: {len(chosen)} sets of entries fit {what}: {names}; {key}=<one of them> chooses")
    taken = [f"{len(fitting[chosen[0]])} entries"]
    taken += [f"under {chosen[0].rstrip('.')}"] if chosen[0] else []
    taken += [] if by_name else ["matched by order because the names differ"]
    taken += [f"{key}={others[0]} takes the other"] if averages and others else []
    return fitting[chosen[0]], ", ".join(taken)


def assign_weights(model: StagedModel, weights: dict[str, Any], complaint: str, *, new_head: bool = False) -> None:
    """Load entries, which may be from before BatchNorm counted batches, in the data types of `model`.

    Raises:
        UserError: they do not match; the line begins with `complaint`. The model is unchanged.
    """
    expected = model.state_dict()
    weights = _completed(weights, expected, head_keys(model) if new_head else set())
    if problem := _problem(weights, expected):
        raise UserError(f"{complaint}: {problem}")
    weights = {key: weights[key].to(value.dtype) for key, value in expected.items()}
    for key, value in weights.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise UserError(f"{complaint}: {key} holds NaN or infinite values as {value.dtype}")
    model.load_state_dict(weights)


def average_instead(content: dict[Any, Any], path: Path) -> dict[Any, Any]:
    """`content` with the moving average of the student's weights as its weights.

    Raises:
        UserError: there is none.
    """
    if not isinstance(content.get("ema"), dict):
        raise UserError(f"{path}: holds no moving average of weights; training.ema_decay=0.999 would have kept one")
    return content | {"model": content["ema"]}


def head_keys(model: StagedModel) -> set[str]:
    """state_dict keys of the classifier, the last stage, and of further ones that only training uses (GoogLeNet)."""

    def keys(network: StagedModel, start: int) -> set[str]:
        used = {id(tensor) for tensor in network.stage_tensors(start)}
        return {key for key, value in network.state_dict(keep_vars=True).items() if id(value) in used}

    evaluated, trained = copy_in_mode(model), copy_in_mode(model, True)
    return keys(evaluated, -1) | (keys(trained, 0) - keys(evaluated, 0))


def flattened(content: dict[Any, Any]) -> dict[str, Any]:
    """Everything within mappings within mappings, under dotted names."""
    return dict(_walk(content, ""))


def unusual(tensor: Tensor) -> str | None:
    """What is unusual about how `tensor` is stored, or None."""
    if tensor.is_nested or tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type == "meta":
        return f"{tensor.dtype}{', nested' * tensor.is_nested}, {tensor.layout} on {tensor.device}"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"{tuple(tensor.shape)} expanded from fewer values"
    return None


def _walk(mapping: dict[Any, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in {**mapping, **_parts_of_module(mapping)}.items():
        if isinstance(value, dict):
            yield from _walk(value, f"{prefix}{key}.")
        elif value is not None:  # stands in a module for a bias that it does not have
            yield f"{prefix}{key}", value


def _parts_of_module(stand_in: dict[Any, Any]) -> dict[str, Any]:
    """Parameters, persistent buffers and parts of a whole module in a file, see `read_checkpoint`."""
    attributes = getattr(stand_in, "__dict__", {})
    groups = [attributes.get(name) for name in ("_parameters", "_buffers", "_modules")]
    parts = {name: part for group in groups if isinstance(group, dict) for name, part in group.items()}
    passing = attributes.get("_non_persistent_buffers_set") or ()
    return {name: part for name, part in parts.items() if name not in passing}


def _by_name(entries: dict[str, Any], expected: dict[str, Tensor], head: set[str]) -> dict[str, dict[str, Any]]:
    """What stands behind each prefix of the network's names; those with most names, which are all of them if it fits.

    An entry of a mapping within another one has a dotted name. Objects that the network does not name are left out,
    tensors are not. A whole set within another one is no part of it: a file may hold a network and, under ``ema.``, its
    average.
    """
    needed = {key for key in expected if key not in head and not key.endswith(COUNTERS)}
    counts = Counter(prefix for key in entries for prefix in _prefixes(key) if key[len(prefix) :] in needed)
    most = max(counts.values(), default=0)
    prefixes = [prefix for prefix in counts if counts[prefix] == most]
    candidates = {}
    for prefix in prefixes:
        within = tuple(other for other in prefixes if len(other) > len(prefix) and most == len(needed))
        candidates[prefix] = {
            key[len(prefix) :]: value
            for key, value in entries.items()
            if key.startswith(prefix) and not key.startswith(within)
            if isinstance(value, Tensor) or key[len(prefix) :] in expected
        }
    return candidates


def _by_order(entries: dict[str, Any], expected: dict[str, Tensor], head: set[str]) -> dict[str, dict[str, Any]]:
    """The sets of entries that have the network's shapes in its order under other names, by their longest prefix."""
    wanted = [key for key in expected if not key.endswith(COUNTERS)]
    tensors = [key for key, value in entries.items() if isinstance(value, Tensor) and not key.endswith(COUNTERS)]
    counts = Counter(prefix for key in tensors for prefix in _prefixes(key))
    found = {}
    for prefix in (prefix for prefix, count in counts.items() if count == len(wanted)):
        names = [key for key in tensors if key.startswith(prefix)]
        pairs = {key: name[len(prefix) :] for key, name in zip(wanted, names)}
        renamed = {key: entries[name] for key, name in zip(wanted, names)}
        fits = all(key in head or _mismatch(value, expected[key]) is None for key, value in renamed.items())
        # Names in alphabetical order, as safetensors has them, do not say how the layers follow one another.
        if fits and names != sorted(names) and all(_may_be(key, name, expected) for key, name in pairs.items()):
            found[names[0]] = prefix, renamed
    return dict(found.values())


def _may_be(key: str, name: str, expected: dict[str, Tensor]) -> bool:
    """Whether an entry that is called `name` in the file can be the network's `key`."""
    ends = {name.rpartition(".")[2], key.rpartition(".")[2]}
    return name == key or (name not in expected and (len(ends) == 1 or not ends <= BATCHNORM_NAMES))


def _prefixes(key: str) -> list[str]:
    """All that may stand before the name of an entry: ``"a.b.c"`` gives ``["", "a.", "a.b."]``."""
    return ["", *accumulate(f"{part}." for part in key.split(".")[:-1])]


def _chosen(fitting: list[str], what: str, prefix: str | None) -> list[str]:
    """The prefixes of those that fit `prefix`, or the role of the network."""
    if prefix is not None:
        wanted = prefix.strip(".")
        exact = [found for found in fitting if found.rstrip(".") == wanted]
        return exact or [found for found in fitting if f".{wanted}." in f".{found}"]
    for role in ("teacher", "student"):
        if role in what.split():
            fitting = [found for found in fitting if role in found] or fitting
    return fitting


def _completed(weights: dict[str, Any], expected: dict[str, Tensor], head: set[str]) -> dict[str, Any]:
    """`weights` with the network's own head, if it is to have a new one, and with its counters if there are none."""
    own = {key: value for key, value in expected.items() if key in head}
    counters = {key: value for key, value in expected.items() if key.endswith(COUNTERS)}
    return counters | weights | own


def _problem(weights: dict[str, Any], expected: dict[str, Tensor]) -> str | None:
    """What is in the way of loading `weights`, in words."""
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    if missing or unknown:
        found = f"lacks {_sample(missing)}" if missing else f"has the unknown {_sample(unknown)}"
        remedy = "" if missing else "; python -m utils.convert import --drop NAME leaves entries out"
        return f"expected {len(expected)} entries, the file {found}{remedy}"
    for key, value in expected.items():
        if mismatch := _mismatch(weights[key], value):
            return f"{key} {mismatch}"
    return None


def _mismatch(found: Any, expected: Tensor) -> str | None:
    if not isinstance(found, Tensor):
        return f"is a {type(found).__name__}, expected a tensor"
    if problem := unusual(found):
        return f"is {problem}, expected a plain tensor"
    if found.shape != expected.shape:
        return f"has shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    kinds = [(tensor.is_floating_point(), tensor.is_complex()) for tensor in (found, expected)]
    return f"is {found.dtype}, expected {expected.dtype}" if kinds[0] != kinds[1] else None


def _sample(keys: list[str]) -> str:
    return keys[0] if len(keys) == 1 else f"{keys[0]} and {len(keys) - 1} more"
