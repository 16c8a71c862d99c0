"""Whether a run or a checkpoint is of the settings and the data that the config names."""

from __future__ import annotations

import logging
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from datasets import Source
from utils.config import Config
from utils.config.changes import deciding_changes
from utils.config.yaml_text import read_yaml
from utils.errors import UserError
from utils.run_folder.layout import Layout

log = logging.getLogger("sakd")


def changed_settings(folder: Path, config: Config) -> str:
    """`deciding_changes` from the run in `folder` to `config`; empty if there is none, or it cannot be read."""
    with suppress(UserError):
        return deciding_changes(read_yaml(Layout(folder).config), config.to_dict())
    return ""


def refuse_other_classes(checkpoint: dict[str, Any], source: Source, what: str) -> None:
    """Compare the data that a checkpoint was trained on with the data in use; files of other projects do not say.

    Another normalisation or image size is one line in the log.

    Args:
        checkpoint: its content.
        source: the data in use.
        what: how messages call the checkpoint.

    Raises:
        UserError: the classes are others, or in another order.
    """
    there, here = checkpoint.get("data"), source.describe()
    if not isinstance(there, dict) or not isinstance(theirs := there.get("classes"), list):
        return
    ours = here.pop("classes")
    for number, (their, our) in enumerate(zip_longest(map(repr, theirs), map(repr, ours), fillvalue="missing")):
        if their != our:
            raise UserError(
                f"{what} knows other classes than the data set: {len(theirs)} classes, here {len(ours)}, and number "
                f"{number} is {their}, here {our}; name one of these classes, or give other data a dataset.label"
            )
    changes = [f"{key} {there[key]}, here {value}" for key, value in here.items() if there.get(key, value) != value]
    if changes:
        log.warning("%s was trained on images prepared in another way: %s", what, "; ".join(changes))
