"""Names in configs: which spellings are accepted and what they are called from then on."""

from __future__ import annotations

import re

from utils.errors import UserError

DATASETS = ("cifar-100", "cifar-10", "tiny-imagenet", "imagenet", "imagefolder", "digits")
DISTILLERS = ("kd", "at", "fitnet", "sp", "rkd", "cc", "vid", "pkt", "ft", "fsp", "nst", "crd")


def safe_name(name: str) -> str:
    """`name`, unchanged: it becomes part of paths, so it must hold nothing that could lead elsewhere.

    Raises:
        ValueError: it does.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", name):
        raise ValueError("must be letters, digits, underscores, dashes and dots")
    return name


def dataset_name(name: str) -> str:
    """``"CIFAR100"``, ``"cifar_100"`` → ``"cifar-100"``.

    Raises:
        ValueError: neither one of ours nor registered in `datasets`.
    """
    for known in DATASETS:
        if fold(known) == fold(name):
            return known
    from datasets.registry import DATASETS as registry  # imported late: it brings torch

    return _registered(registry, name)


def distiller_name(name: str) -> str:
    """``"FitNet"`` → ``"fitnet"``.

    Raises:
        ValueError: neither one of ours nor registered in `distillers`.
    """
    if name.lower() in DISTILLERS:
        return name.lower()
    from distillers.registry import DISTILLERS as registry  # imported late: it brings torch

    return _registered(registry, name)


def optimizer_name(name: str) -> str:
    """``"sgd"`` → ``"SGD"``."""
    if name.upper() != "SGD":
        raise ValueError("must be SGD, the only optimiser implemented")
    return "SGD"


def short_name(model: str) -> str:
    """The last part of an import path: ``"torchvision.models.resnet34"`` → ``"resnet34"``."""
    return model.rpartition(".")[2]


def same_family(teacher: str, student: str) -> bool:
    """Whether two models differ in depth alone; ``homo`` of the published configs.

    resnet56 and resnet20 are of one family, and so are wrn_40_2 and wrn_16_2, but not resnet32x4 and resnet32,
    whose widths differ, nor resnet20 and ResNet50, whose blocks do.
    """
    return _without_depth(teacher) == _without_depth(student)


def needs_small_lr(model: str) -> bool:
    """Whether the published learning rate is 0.01 instead of 0.05."""
    return short_name(model).lower().startswith(("mobilenet", "shuffle"))


def _without_depth(model: str) -> str:
    # The depth is the first number; the one after a capital V is a version (MobileNetV2).
    return re.sub(r"(?<=[a-z_])\d+", "", short_name(model), count=1)


def _registered(registry, name: str) -> str:
    try:
        return registry.canonical(name)
    except UserError as error:
        raise ValueError(str(error)) from None


def fold(name: str) -> str:
    """`name` without what people spell differently: case, dashes, underscores."""
    return re.sub(r"[-_]", "", name).lower()
