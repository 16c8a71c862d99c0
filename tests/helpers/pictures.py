"""Small image folders and configs for the tests of `datasets`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

import datasets
from datasets import Data, Loader, make_loader, readable_part
from utils.config.schema import DatasetConfig

SEED = 7


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_picture(height: int, width: int, seed: int = 0) -> Image.Image:
    """A picture that scaling and JPEG change little."""
    coarse = Image.fromarray(noise(4, 4, 3, seed=seed))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def save(picture: Image.Image, path: Path) -> Path:
    """Write a picture, and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


def image_folder(root: Path, train: int = 6, val: int = 3, classes=("ant", "bee"), size=(40, 40)) -> Path:
    """``train`` and ``val`` with so many pictures in each class, all different."""
    seed = 0
    for split, count in {"train": train, "val": val}.items():
        for name in classes:
            for number in range(count):
                seed += 1
                save(smooth_picture(*size, seed=seed), root / split / name / f"{number:03d}.png")
    return root


def open_data(
    name: str, root: Path | str = "data", *, batch_size=8, workers=0, seed=SEED, device="cpu", shard=(0, 1), **keys
) -> Data:
    """A data set and its loaders, with small batches on the CPU."""
    config = DatasetConfig.model_validate({"name": name, "root": str(root), **keys})
    source = readable_part(datasets.open_data(config), config, workers)
    how = {"seed": seed, "device": device, "shard": shard}
    return Data(source, *(make_loader(source, config, split, batch_size, workers, **how) for split in ("train", "val")))


def whole(loader: Loader, epoch: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels of one epoch, in the order of their index."""
    batches = list(loader.epoch(epoch))
    order = torch.cat([batch.index for batch in batches]).argsort()
    return tuple(torch.cat([getattr(batch, name) for batch in batches])[order] for name in ("image", "label"))
