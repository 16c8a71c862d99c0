"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet at 64x64."""

from __future__ import annotations

from pathlib import Path

from datasets.download import Archive
from datasets.folders import class_names, enumerate_some, find_folder, scan
from datasets.registry import register_dataset
from datasets.source import CIFAR10_NORM, Files, Source
from utils.errors import UserError

ARCHIVE = Archive("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "tiny-imagenet-200")


@register_dataset("tiny-imagenet")
def tiny_imagenet(root: Path) -> Source:
    """100,000 training and 10,000 validation images in the official layout.

    Found as `root` itself, as ``<root>/tiny-imagenet-200`` or as ``<root>/tiny-imagenet-200.zip``; downloaded
    otherwise. Labels number the sorted WordNet ids, as is customary (``wnids.txt`` is in another order). The
    published runs flip only, and normalise with the figures of CIFAR-10.

    Raises:
        UserError: something is missing; the line names it.
    """
    home = root if (root / "train").is_dir() else ARCHIVE.provide(root)
    train, val = find_folder(home, ["train"]), find_folder(home, ["val"])
    classes = class_names(train)
    return Source(
        scan(train, classes),
        _annotated(val, classes) if (val / "images").is_dir() else scan(val, classes),
        classes,
        *CIFAR10_NORM,
        augment="flip",
        image_size=(64, 64),
    )


def _annotated(val: Path, classes: tuple[str, ...]) -> Files:
    """The images in ``val/images``, which ``val/val_annotations.txt`` assigns to classes."""
    table = val / "val_annotations.txt"
    if not table.is_file():
        raise UserError(f"{table}: missing; it says which class each file in {val / 'images'} belongs to")
    rows = [line.split("\t")[:2] for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
    if short := [row for row in rows if len(row) < 2]:
        raise UserError(f"{table}: found {short[0][0]!r}, expected the name of a file, a tab and its class")
    if unknown := sorted({wnid for _, wnid in rows} - set(classes)):
        raise UserError(f"{table}: no training images of class {enumerate_some(unknown)}")
    label_of = {name: label for label, name in enumerate(classes)}
    return Files([val / "images" / name for name, _ in rows], [label_of[wnid] for _, wnid in rows])
