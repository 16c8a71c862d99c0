"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet at 64x64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.download import provide
from datasets.folder import find_folder, scan
from datasets.registry import register_dataset
from datasets.rows import source_of_rows
from datasets.source import CIFAR10_NORM, Files, Source
from utils.errors import UserError

URL, MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


@register_dataset("tiny-imagenet")
def tiny_imagenet(root: Path) -> Source:
    """100,000 training and 10,000 validation images in the official layout.

    Found as `root` itself, as ``<root>/tiny-imagenet-200`` or as ``<root>/tiny-imagenet-200.zip``; downloaded
    otherwise. Labels number the sorted WordNet ids, as is customary (``wnids.txt`` is in another order). The
    published runs flip only, and normalise with the figures of CIFAR-10.

    Raises:
        UserError: something is missing; the line names it.
    """
    home = root if (root / "train").is_dir() else provide(root, "tiny-imagenet-200", URL, MD5)
    train, val = scan(find_folder(home, ["train"])), home / "val"
    val = _annotated(val) if (val / "images").is_dir() else scan(find_folder(home, ["val"]))
    paths, labels = zip(*train, *val)
    source = source_of_rows(
        lambda rows, numbers: Files([paths[row] for row in rows], numbers),
        labels,
        ["train"] * len(train) + ["val"] * len(val),
        None,
        str(home),
        numbers=False,
    )
    return replace(source, mean=CIFAR10_NORM[0], std=CIFAR10_NORM[1], augment="flip", image_size=(64, 64))


def _annotated(val: Path) -> list[tuple[str, str]]:
    """Path and class of the images in ``val/images``, as ``val/val_annotations.txt`` says."""
    table = val / "val_annotations.txt"
    if not table.is_file():
        raise UserError(f"{table}: missing; it says which class each file in {val / 'images'} belongs to")
    rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise UserError(f"{table}: found {short[0][0]!r}, expected the name of a file, a tab and its class")
    return [(str(val / "images" / row[0]), row[1]) for row in rows]
