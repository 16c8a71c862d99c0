"""Drops of the learning rate keep their shares of the training where the command line changes its length."""

from __future__ import annotations

import logging
from functools import cache

from utils.config.layers import COMMAND_LINE, Layers
from utils.config.schema import Config

log = logging.getLogger("sakd")

DROPS = ("lr_decay_epochs", "lr_agent_decay_epochs")


def config_of(layers: Layers) -> Config:
    """What `layers` amount to, checked.

    Where the command line sets ``training.epochs`` and not the drops, those of a file, or the usual ones, are scaled to
    the new length, which a log line says.

    Raises:
        UserError: one line that names the file, the key, what was found and what would do.
    """
    config = Config.from_dict(layers.data, layers.source)
    training, typed = config.training, layers.typed.get("training", {})
    before = _epochs(layers)
    if "epochs" not in typed or before == training.epochs or training.schedule == "cosine":
        return config
    given = {name: getattr(training, name) for name in DROPS if name not in typed}
    if "lr_decay_epochs" in typed and layers.data["training"].get("lr_agent_decay_epochs") is None:
        del given["lr_agent_decay_epochs"]  # it follows the other
    scaled = {name: _scaled(epochs, training.epochs / before) for name, epochs in given.items()}
    changed = {name: epochs for name, epochs in scaled.items() if epochs != given[name]}
    if changed:
        name, epochs = next(iter(changed.items()))
        old, new = list(given[name]), list(epochs)
        _say(f"training.{name}: {new}, scaled to {training.epochs} epochs from {old} of {before}")
    return config.model_copy(update={"training": training.model_copy(update=changed)})


@cache
def _say(line: str) -> None:
    """Log it once, for all configs of a grid."""
    log.info(line)


def _epochs(layers: Layers) -> int:
    """The number of epochs without the command line."""
    files = Layers(layers.name, [part for part in layers.parts if part[0] != COMMAND_LINE]).data
    section = files.get("training")
    epochs = section.get("epochs") if isinstance(section, dict) else None
    return epochs if isinstance(epochs, int) and epochs > 0 else Config.model_fields["training"].default.epochs


def _scaled(drops: tuple[int, ...], factor: float) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(epoch * factor)) for epoch in drops}))
