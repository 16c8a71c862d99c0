"""Make data/cifar-10 and data/cifar-10-mini, the images of docs/results.md.

    python docs/results/images.py           # out of torchvision's CIFAR-10, which is downloaded
    python docs/results/images.py FOLDER    # out of a folder with train/<class>/ and test/<class>/

The first has all 60,000 images, the second the first 500 of each class by name to train on, and all test images.
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
    shutil.copytree(whole / "test", out / "test", dirs_exist_ok=True)


def main() -> None:
    parser = Parser(description="Make data/cifar-10 and data/cifar-10-mini, the images of docs/results.md.")
    parser.add_argument("folder", nargs="?", type=Path, help="with train/<class>/ and test/<class>/")
    given, whole = parser.parse_args().folder, Path("data/cifar-10")
    if given:
        missing = [name for name in ("train", "test") if not (given / name).is_dir()]
        if missing:
            raise UserError(f"{given}: no folder {missing[0]}/ in it; without a folder, CIFAR-10 is downloaded")
        shutil.copytree(given, whole, dirs_exist_ok=True)
    elif not whole.exists():
        write_images(whole, Path("data"))
    write_part(whole, Path("data/cifar-10-mini"))


if __name__ == "__main__":
    guarded(main)
