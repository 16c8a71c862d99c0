"""Tiny-ImageNet (Stanford CS231n): 200 classes of ImageNet at 64x64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from datasets.download import provide
from datasets.folder import scan, source_of_files
from datasets.registry import register_dataset
from datasets.source import CIFAR10_NORM, Source
from utils.errors import doing

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
    val = home / "val"
    found = {"train": scan(home / "train"), "val": _annotated(val) if (val / "images").is_dir() else scan(val)}
    source = source_of_files(found, None, str(home))
    return replace(source, mean=CIFAR10_NORM[0], std=CIFAR10_NORM[1], augment="flip", image_size=(64, 64))


def _annotated(val: Path) -> list[tuple[str, str]]:
    """Path and class of the images in ``val/images``, as ``val/val_annotations.txt`` says."""
    table = val / "val_annotations.txt"
    with doing(f"reading {table}, the classes of the files in {val / 'images'},"):
        rows = [line.split("\t") for line in table.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(str(val / "images" / row[0]), row[1]) for row in rows]
