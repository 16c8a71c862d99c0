"""Write the class of every image in a folder to a table, by a trained network in any form.

python -m utils.predict run/digits/1029/adaptive-at/resnet20-resnet8 FOLDER out.csv
python -m utils.predict student.onnx FOLDER out.csv
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import pandas as pd
import torch
from torch import Tensor

from datasets import Source
from datasets.folder import find_images
from utils.command import Parser, guarded
from utils.errors import UserError, doing
from utils.export.exported import ENDINGS, open_exported
from utils.files import check_writable, refuse_to_replace, write_text
from utils.training.reporter import progress_bar
from utils.training.restore import add_arguments, restore_from

log = logging.getLogger("sakd")

Network: TypeAlias = Callable[[Tensor], Tensor]  # normalised images [B, 3, H, W] to logits [B, num_classes]

HEADER = ["image", "predicted", "probability"]
BATCH = 64


def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m utils.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser, f"a checkpoint, a file that utils.export wrote ({', '.join(ENDINGS)})")
    parser.add_argument("folder", type=Path, help="images, in this folder and those below it")
    parser.add_argument("out", type=Path, metavar="OUT.csv", help=f"the table to write: {', '.join(HEADER)}")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="config keys, e.g. training.device=cpu")
    options = parser.parse_intermixed_args(arguments)
    refuse_to_replace([options.out], options.out, mark=",".join(HEADER))
    check_writable(options.out.parent)
    files = find_images(options.folder)
    with doing(f"predicting by {options.checkpoint}"):
        rows = list(predict(*open_network(options), files))
    if not rows:
        raise UserError(f"{options.folder}: none of its {len(files)} images can be read")
    write_text(options.out, pd.DataFrame(rows, columns=HEADER, dtype=object).to_csv(index=False))
    lost = len(files) - len(rows)
    print(f"{options.out}: {len(rows)} images{f'; {lost} could not be read' if lost else ''}")
    return 0


def open_network(options: argparse.Namespace) -> tuple[Network, Source]:
    """The network that the command line names, its images and its classes.

    The data set that it was trained on need not be there.

    Raises:
        UserError: the file cannot be read, or is not to be trusted.
    """
    file = Path(options.checkpoint)
    if file.suffix in ENDINGS:
        if options.overrides:
            raise UserError(f"{options.overrides[0]}: an exported file is used as it is; leave config keys out")
        return open_exported(file, trust=options.trust)
    if words := [word for word in options.overrides if word.startswith("dataset.")]:
        raise UserError(f"{words[0]}: images are prepared as the checkpoint says; leave the keys of the data set out")
    restored = restore_from(options, options.overrides, images=False)
    student = restored.student()

    def network(images: Tensor) -> Tensor:
        with restored.autocast:
            return student(images.to(restored.device)).float().cpu()

    return network, restored.source


@torch.inference_mode()
def predict(network: Network, source: Source, files: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """File, class and probability of each image; one that cannot be read is named and passed over."""

    def read(file: str) -> Tensor | None:
        try:
            return source.read(file)
        except UserError as error:
            log.warning("%s", error)
            return None

    with ThreadPoolExecutor() as pool, progress_bar("images", len(files)) as bar:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            images = {file: image for file, image in zip(batch, pool.map(read, batch)) if image is not None}
            if images:
                chances, classes = network(torch.stack(list(images.values()))).softmax(dim=1).max(dim=1)
                for file, chance, k in zip(images, chances.tolist(), classes.tolist()):
                    yield file, source.class_names[k], f"{chance:.4f}"
            bar.update(len(batch))


if __name__ == "__main__":
    guarded(main)
