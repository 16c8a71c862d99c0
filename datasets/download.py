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
    """``<root>/<folder>``, which is unpacked, and before that downloaded, if it is not there.

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
    if not may_write():
        raise UserError(
            f"dataset.root: {root}, which a file names, holds no {folder}; dataset.root={root} on the "
            "command line has it downloaded there, or names another folder"
        )
    archive, is_new = root / url.rpartition("/")[2], not root.exists()
    root.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as scratch:
            if not archive.is_file():
                _download(url, md5, Path(scratch, archive.name), folder)
                Path(scratch, archive.name).replace(archive)
            _unpack(archive, Path(scratch), folder)
    finally:
        if is_new and not any(root.iterdir()):
            root.rmdir()
    return root / folder


def _download(url: str, md5: str, target: Path, folder: str) -> None:
    from torchvision.datasets.utils import download_url  # takes a second to import

    before, root = socket.getdefaulttimeout(), target.parents[1]
    socket.setdefaulttimeout(TIMEOUT)
    try:
        log.info("downloading %s to %s", url, root)
        download_url(url, target.parent, target.name, md5)
    except Exception as error:  # of the network, or a wrong checksum
        raise UserError(
            f"dataset.root: {root} holds no {folder}, and {url} cannot be downloaded ({reason(error)}); "
            f"put {target.name} or the folder {folder} in {root}, or use dataset=digits, which needs no files"
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _unpack(archive: Path, scratch: Path, folder: str) -> None:
    log.info("unpacking %s", archive)
    try:
        # Names in the archive that lead out of the folder are passed over in a zip file and refused in a tar file.
        shutil.unpack_archive(archive, scratch, **({} if archive.suffix == ".zip" else {"filter": "data"}))
        os.rename(scratch / folder, archive.parent / folder)
    except Exception as error:  # each kind of archive raises errors of its own
        if not (archive.parent / folder).is_dir():  # else another process was faster
            raise UserError(f"{archive}: cannot be unpacked ({reason(error)}); delete it and run again") from error
