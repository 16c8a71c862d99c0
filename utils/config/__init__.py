"""Configs: read from YAML, checked, and handed on as one frozen `Config`.

`load_config` reads a file, `find_config` looks one up for the launchers or composes what no file spells out.
``python -m utils.config`` lists every key; ``python -m utils.config FILE key=value ...`` shows what a file amounts to.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from utils.config.find import find_config
from utils.config.layers import Layers
from utils.config.schema import Config, DatasetConfig, ModelConfig

__all__ = ["Config", "DatasetConfig", "ModelConfig", "find_config", "load_config"]


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read, complete and check a config.

    Args:
        path: a YAML file.
        overrides: ``key=value`` words that win over the file, e.g. ``"training.epochs=10"``.

    Raises:
        UserError: one line that names the file, the key, what was found and what would do.
    """
    layers = Layers(str(path))
    layers.add_file(path)
    return layers.load(overrides)
