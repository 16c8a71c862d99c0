"""Make data/cifar-10 and data/cifar-10-mini, the images of docs/results.md, of torchvision's CIFAR-10.

    python docs/results/images.py

The first has all 60,000 images, the second the first 500 of each class to train on, and all test images.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from pathlib import Path

from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.command import Parser, guarded
from utils.errors import UserError

DATA = Path("data")
PER_CLASS = {"cifar-10": 5_000, "cifar-10-mini": 500}  # training images


def write_images(out: Path, per_class: int) -> None:
    """``<out>/{train,test}/<class>/<number>.png``, numbered within each class; `out` is there when it is complete."""
    part = out.with_name(f"{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    for split, limit in (("train", per_class), ("test", None)):
        data = CIFAR10(DATA, train=split == "train", download=True)
        numbers: Counter[str] = Counter()
        for image, label in data:
            name = data.classes[label]
            if limit is None or numbers[name] < limit:
                file = part / split / name / f"{numbers[name]:04}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                image.save(file)
                numbers[name] += 1
    part.rename(out)


def main() -> None:
    Parser(description=__doc__.splitlines()[0]).parse_args()
    if there := next((DATA / name for name in PER_CLASS if (DATA / name).exists()), None):
        raise UserError(f"{there}: is there already; delete it to make it anew")
    for name, per_class in PER_CLASS.items():
        write_images(DATA / name, per_class)


if __name__ == "__main__":
    guarded(main)
