"""Data sets that come as an archive from the web."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from utils.errors import UserError, reason

log = logging.getLogger("sakd")

_may_write: ContextVar[bool] = ContextVar("may_write", default=True)


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Take only what is there: nothing is downloaded or unpacked within, since a file has chosen the folder."""
    token = _may_write.set(False)
    try:
        yield
    finally:
        _may_write.reset(token)


def may_write() -> bool:
    """The person at the keyboard has chosen the folder of the data."""
    return _may_write.get()


def provide(root: Path, folder: str, url: str, md5: str) -> Path:
    """``<root>/<folder>``, which is downloaded and unpacked if it is not there; an archive in `root` is taken.

    The folder gets its name only when it is complete: an interrupted run leaves nothing that the next one would take
    for the data.

    Args:
        root: the folder for data sets.
        folder: what the archive holds.
        url: where the archive is published.
        md5: its checksum.

    Raises:
        UserError: it is neither there nor to be had.
    """
    if (root / folder).is_dir():
        return root / folder
    if not may_write():
        raise UserError(
            f"dataset.root: {root}, which a file names, holds no {folder}; dataset.root={root} on the "
            "command line has it downloaded there, or names another folder"
        )
    from torchvision.datasets.utils import download_and_extract_archive  # takes a second to import

    archive, is_new = url.rpartition("/")[2], not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as scratch:
            log.info("unpacking %s to %s, which is downloaded if it is not there", url, root)
            download_and_extract_archive(url, root if (root / archive).is_file() else scratch, scratch, md5=md5)
            os.rename(Path(scratch, folder), root / folder)
    except Exception as error:  # of the network, a wrong checksum, a full disk
        if not (root / folder).is_dir():  # else another process was faster
            raise UserError(
                f"dataset.root: {root} holds no {folder}, and {url} cannot be downloaded ({reason(error)}); "
                f"put {archive} or the folder {folder} in {root}, or use dataset=digits, which needs no files"
            ) from error
    finally:
        if is_new and not any(root.iterdir()):
            root.rmdir()
    return root / folder
