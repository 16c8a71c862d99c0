"""Names in configs: which spellings are accepted and what they are called from then on."""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationInfo

from distillers.spot_adaptive.selection import SELECTIONS
from utils.errors import UserError
from utils.libraries import TIMM, is_timm
from utils.registry import Registry, names_in_source, spelling

# Context in which a config is validated that a run has written. A student can be used without its policy, so a name has
# to be known only where it is used.
WRITTEN = "written"
_SAFE = r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*"
_LONGEST_LABEL = 100  # letters: a pair's folder has two of them, and file systems stop at 255


def safe_name(name: str) -> str:
    """`name`, unchanged: it becomes part of paths, so it must hold nothing that could lead elsewhere.

    Raises:
        ValueError: it does.
    """
    if not re.fullmatch(_SAFE, name):
        raise ValueError("must be letters, digits, underscores, dashes and dots")
    return name


def network_name(name: str) -> str:
    """`name`, unchanged: a `safe_name`, or one behind ``timm/``.

    Raises:
        ValueError: it is neither.
    """
    safe_name(name.removeprefix(TIMM))
    return name


def registered(package: str, kind: str, registry: str) -> Callable[[str], str]:
    """A validator that gives the registered spelling of a name: ``"CIFAR100"`` → ``"cifar-100"``.

    Args:
        package: whose modules register entries.
        kind: of an entry, which ``register_<kind>`` adds.
        registry: the object in the package's ``registry`` module.
    """

    def canonical(name: str, info: ValidationInfo) -> str:
        if known := spelling(name, names_in_source(package, kind)):
            return known
        # Imported this late because it brings PyTorch.
        entries: Registry = getattr(importlib.import_module(f"{package}.registry"), registry)
        try:
            return entries.canonical(name)
        except UserError as error:
            if info.context == WRITTEN:
                return name
            raise ValueError(str(error)) from None

    return canonical


def model_label(name: str, kwargs: Mapping[str, Any] | None = None, label: str | None = None) -> str:
    """What a network is called in folders, files and reports.

    That is `label` if the user gave one. Else it is `name`, with a dash for a slash, followed by the keyword arguments:
    ``timm-vit_tiny_patch16_224-img_size-64``. So two networks have two names. What a folder name cannot spell is
    replaced, and a long name is cut; both then end in six digits of a hash.
    """
    if label:
        return label
    words = [name.replace("/", "-")]
    for key, value in sorted((kwargs or {}).items()):
        words += [key, value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)]
    full = "-".join(words)
    if re.fullmatch(_SAFE, full) and len(full) <= _LONGEST_LABEL:
        return full
    readable = re.sub(r"(?:[^A-Za-z0-9_.-]|\.(?![A-Za-z0-9]))+", "_", full).replace("-_", "-")[:_LONGEST_LABEL]
    digest = hashlib.sha256(full.encode(errors="surrogatepass")).hexdigest()
    return f"{readable.rstrip('._-')}-{digest[:6]}"


def selection_label(selection: str, policy: str) -> str:
    """``"adaptive"``, or ``"adaptive by <policy>"`` where it is not the published one."""
    return f"{selection} by {policy}" if SELECTIONS[selection].policy and policy != "gumbel" else selection


def function_name(model: str) -> str:
    """The last part of an import path: ``"torchvision.models.resnet34"`` → ``"resnet34"``. A name of timm loses its
    weights: ``"timm/resnet34.a1_in1k"`` → ``"resnet34"``."""
    return model.removeprefix(TIMM).partition(".")[0] if is_timm(model) else model.rpartition(".")[2]


def same_family(teacher: str, student: str) -> bool:
    """Whether two models differ in depth alone; ``homo`` of the published configs.

    resnet56 and resnet20 are of one family, and so are wrn_40_2 and wrn_16_2, but not resnet32x4 and resnet32,
    whose widths differ, nor resnet20 and ResNet50, whose blocks do.
    """
    return _without_depth(teacher) == _without_depth(student) and is_timm(teacher) == is_timm(student)


def needs_small_lr(model: str) -> bool:
    """Whether the published learning rate is 0.01 instead of 0.05."""
    return function_name(model).lower().startswith(("mobilenet", "shuffle"))


def _without_depth(model: str) -> str:
    # The depth is the first number; the one after a capital V is a version (MobileNetV2).
    return re.sub(r"(?<=[a-z_])\d+", "", function_name(model), count=1)
