"""Make data/cifar-10 and data/cifar-10-mini, the images of docs/results.md, of torchvision's CIFAR-10.

    python docs/results/images.py

The first has all 60,000 images, the second the first 500 of each class by name to train on, and all test images.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchvision.datasets import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[2]))

from utils.command import Parser, guarded
from utils.errors import UserError

PER_CLASS = 500


def write_images(out: Path, download_to: Path) -> None:
    """torchvision's CIFAR-10 as ``<out>/{train,test}/<class>/<number>.png``, numbered within each class."""
    for split in ("train", "test"):
        data = CIFAR10(download_to, train=split == "train", download=True)
        numbers: Counter[str] = Counter()
        for image, label in data:
            name = data.classes[label]
            folder = out / split / name
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{numbers[name]:04}.png")
            numbers[name] += 1


def write_part(whole: Path, out: Path) -> None:
    """Copies of the first images of each class of `whole`, and of all its test images."""
    for folder in sorted(path for path in (whole / "train").iterdir() if path.is_dir()):
        (out / "train" / folder.name).mkdir(parents=True, exist_ok=True)
        for file in sorted(folder.iterdir())[:PER_CLASS]:
            shutil.copy(file, out / "train" / folder.name)
    shutil.copytree(whole / "test", out / "test")


@contextmanager
def complete(folder: Path) -> Iterator[Path]:
    """A folder that takes the name `folder` when all is in it."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    yield part
    part.rename(folder)


def main() -> None:
    Parser(description=__doc__.splitlines()[0]).parse_args()
    whole, few = Path("data/cifar-10"), Path("data/cifar-10-mini")
    if there := next((path for path in (few, whole) if path.exists()), None):
        raise UserError(f"{there}: is there already; delete it to make it anew")
    with complete(whole) as part:
        write_images(part, Path("data"))
    with complete(few) as part:
        write_part(whole, part)


if __name__ == "__main__":
    guarded(main)
