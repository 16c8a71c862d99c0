"""Where images come from and how they reach the training device.

A *source* (one file each: `digits`, `cifar`, `tiny_imagenet`, `imagenet`, `folder`, `table`) knows what a data set
holds; a *loader* (`loading.loader`, `loading.stream`) turns it into batches. To add a data
set, put a file here that registers a function ``(root: Path) -> Source``.
"""

from datasets.batch import Batch
from datasets.build import Data, check_batches, make_loader, open_data
from datasets.check import readable_part
from datasets.loading.loader import Loader
from datasets.registry import DATASETS, register_dataset
from datasets.source import Arrays, Files, Source

__all__ = [
    "DATASETS",
    "Arrays",
    "Batch",
    "Data",
    "Files",
    "Loader",
    "Source",
    "check_batches",
    "make_loader",
    "open_data",
    "readable_part",
    "register_dataset",
]
