"""Data sets that come as an archive from the web."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from utils.errors import UserError, reason

log = logging.getLogger("sakd")

TIMEOUT = 30  # seconds without an answer

# The person at the keyboard has chosen the folder of the data.
may_write: ContextVar[bool] = ContextVar("may_write", default=True)


@contextlib.contextmanager
def without_downloads() -> Iterator[None]:
    """Take only what is there: nothing is downloaded or unpacked within, since a file has chosen the folder."""
    token = may_write.set(False)
    try:
        yield
    finally:
        may_write.reset(token)


def provide(root: Path, folder: str, url: str, md5: str) -> Path:
    """``<root>/<folder>``, which is downloaded and unpacked if it is not there; an archive in `root` is taken.

    Archive and folder get their names only when they are complete: an interrupted run leaves nothing that the next
    one would take for the data.

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
    if not may_write.get():
        raise UserError(
            f"dataset.root: {root}, which a file names, holds no {folder}; dataset.root={root} on the "
            "command line has it downloaded there, or names another folder"
        )
    archive, is_new = root / url.rpartition("/")[2], not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as scratch:
            if not archive.is_file():
                from torchvision.datasets.utils import download_url  # takes a second to import

                log.info("downloading %s to %s", url, root)
                before = socket.getdefaulttimeout()
                socket.setdefaulttimeout(TIMEOUT)
                try:
                    download_url(url, scratch, md5=md5)
                finally:
                    socket.setdefaulttimeout(before)
                Path(scratch, archive.name).replace(archive)
            log.info("unpacking %s", archive)
            # Names in the archive that lead out of the folder are passed over in a zip file and refused in a tar file.
            shutil.unpack_archive(archive, scratch, **({} if archive.suffix == ".zip" else {"filter": "data"}))
            os.rename(Path(scratch, folder), root / folder)
    except Exception as error:  # of the network, a wrong checksum, a full disk, half an archive
        if not (root / folder).is_dir():  # else another process was faster
            failed = "unpacked" if archive.is_file() else f"downloaded from {url}"
            raise UserError(
                f"dataset.root: {root} holds no {folder}, and {archive.name} cannot be {failed} ({reason(error)}); put "
                f"{archive.name} or the folder {folder} in {root}, or use dataset=digits, which needs no files"
            ) from error
    finally:
        if is_new and not any(root.iterdir()):
            root.rmdir()
    return root / folder
