"""Which code a file may name: a checkpoint from elsewhere is data, and must not choose what runs here."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models import is_short_name
from utils.config import Config, ModelConfig
from utils.config.layers import Layers
from utils.errors import UserError, doing
from utils.libraries import is_timm, without_weights

Key = tuple[str, ...]

TRUST_HELP = (
    "build every network that the checkpoint names, with all its arguments; without it, only networks of this project, "
    "torchvision and timm are built unless the command line names them"
)
_WORD = re.compile(r"[\w.-]*")  # no path and no address
_LOADING = re.compile(r"pretrained|weights|checkpoint")  # arguments with which torchvision and timm fetch or read files


def refuse_foreign_network(network: ModelConfig, section: str, path: Path, words: Sequence[str] | None) -> None:
    """Refuse to build a network that the file at `path` names, unless it is known to do nothing but build a network.

    Args:
        network: what the file and the command line amount to.
        section: where it stands, e.g. ``"kd.student"``.
        path: the file.
        words: ``key=value`` words of the command line, which agree to the values that they set; None agrees to all.

    Raises:
        UserError: the line says how to agree.
    """
    if words is None:
        return
    key, place = f"{section}.name", tuple(section.split("."))
    if (*place, "name") not in _agreed(words) and not is_known_builder(network.name):
        raise UserError(
            f"{path}: {key} is {network.name}, no network of this project, torchvision or timm, and building it "
            f"runs its code; {key}={network.name} on the command line agrees to that, --trust to all that the file "
            "says"
        )
    # What asks for weights is not looked at: those of the checkpoint take their place.
    _refuse_files((*place, "kwargs"), without_weights(network.name, network.kwargs), path, words)


def refuse_foreign_options(config: Config, path: Path, words: Sequence[str] | None) -> None:
    """The same for options of the distiller, the loss at the logits and the policy, which might name a file."""
    if words is None:
        return
    for key in ("options", "logits_options"):
        _refuse_files(("kd_loss", key), getattr(config.kd_loss, key), path, words)
    _refuse_files(("kd", "policy_options"), config.kd.policy_options, path, words)


def _refuse_files(section: Key, arguments: Any, path: Path, words: Sequence[str]) -> None:
    agreed = _agreed(words)
    for full, value in _leaves(section, arguments):
        if full not in agreed and not _is_harmless(full, value):
            key = ".".join(map(str, full))
            raise UserError(
                f"{path}: {key} is {reprlib.repr(value)}, which might be a file to read or to fetch; {key}=<value> "
                "on the command line sets it, --trust agrees to all that the file says"
            )


def _agreed(words: Sequence[str]) -> set[Key]:
    command_line = Layers("")
    command_line.add_overrides(words)
    return {key for key, _ in _leaves((), command_line.data)}


def is_known_builder(name: str) -> bool:
    """Whether `name` is that of a registered model, or the import path of a model builder of torchvision or timm.

    Raises:
        UserError: timm is needed to tell, and not installed.
    """
    if is_short_name(name) or is_timm(name):
        return True  # registered with us or timm, or refused
    package, _, builder = name.rpartition(".")
    if f"{package}.".startswith("torchvision.models."):
        from torchvision import models

        known = models.list_models(module=models)  # classifiers; detectors fetch their backbones unasked
        return builder in known and package in ("torchvision.models", models.get_model_builder(builder).__module__)
    if name == "timm.create_model":
        return True  # its argument `model_name` is a word, so no address
    if f"{package}.".startswith("timm.models."):
        with doing(f"model {name!r}: importing timm"):
            import timm
        known = timm.list_models()
        return builder in known and package in ("timm.models", timm.model_entrypoint(builder).__module__)
    return False


def _leaves(key: Key, value: Any) -> Iterator[tuple[Key, Any]]:
    """The values in mappings and lists, however deep, each with its key."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield from _leaves((*key, name), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(key, item)
    else:
        yield key, value


def _is_harmless(key: Key, value: Any) -> bool:
    if any(_LOADING.search(str(name)) for name in key):
        return value is None or value is False
    return value is None or isinstance(value, int | float) or bool(_WORD.fullmatch(str(value)))
