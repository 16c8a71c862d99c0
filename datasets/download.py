"""Data sets that come as an archive from the web."""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError

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


@dataclass(frozen=True)
class Archive:
    """An archive and the folder that it unpacks to.

    Attributes:
        url: where it is published.
        folder: name of the folder inside.
        md5: its checksum; None: unknown.
    """

    url: str
    folder: str
    md5: str | None = None

    @property
    def filename(self) -> str:
        """Its name on disk."""
        return self.url.rpartition("/")[2]

    def provide(self, root: Path) -> Path:
        """The unpacked folder in `root`, which is unpacked, and before that downloaded, if it is not there.

        A file or folder gets its final name only when it is complete: an interrupted run leaves nothing that the
        next one would take for the data.

        Raises:
            UserError: it is neither there nor to be had.
        """
        if not (root / self.folder).is_dir():
            if not _may_write.get():
                raise UserError(
                    f"dataset.root: {root}, which a file names, holds no {self.folder}; dataset.root={root} on the "
                    "command line has it downloaded there, or names another folder"
                )
            if not (root / self.filename).is_file():
                self._download(root)
            self._unpack(root)
        return root / self.folder

    def _download(self, root: Path) -> None:
        target = root / self.filename
        part = root / f".{self.filename}.{os.getpid()}.part"
        try:
            with urllib.request.urlopen(self.url, timeout=TIMEOUT) as response:
                log.info("downloading %s to %s", self.url, target)
                root.mkdir(parents=True, exist_ok=True)
                with part.open("wb") as file:
                    shutil.copyfileobj(response, file)
            self._verify(part, response.headers.get("Content-Length"))
            part.replace(target)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise UserError(
                f"dataset.root: {root} holds no {self.folder}, and {self.url} cannot be downloaded ({reason}); "
                f"put {self.filename} or the folder {self.folder} in {root}, "
                "or use dataset=digits, which needs no files"
            ) from error
        finally:
            with contextlib.suppress(OSError):  # it may not even have been made
                part.unlink()

    def _verify(self, file: Path, length: str | None) -> None:
        if length is not None and file.stat().st_size != int(length):
            raise OSError("the connection broke off")
        from torchvision.datasets.utils import check_integrity  # takes a second to import

        if not check_integrity(file, self.md5):
            raise OSError("the checksum is wrong")

    def _unpack(self, root: Path) -> None:
        archive = root / self.filename
        log.info("unpacking %s", archive)
        try:
            with tempfile.TemporaryDirectory(prefix=".unpacking-", dir=root) as scratch:
                _extract(archive, Path(scratch))
                os.rename(Path(scratch, self.folder), root / self.folder)
        except (OSError, EOFError, ValueError, zlib.error, zipfile.BadZipFile, tarfile.TarError) as error:
            if (root / self.folder).is_dir():  # another process was faster
                return
            raise UserError(f"{archive}: cannot be unpacked ({error}); delete it and run again") from error


def _extract(archive: Path, target: Path) -> None:
    """Unpack a zip or tar.gz file; nothing in it may land outside `target`."""
    if archive.suffix != ".zip":
        with tarfile.open(archive, "r:gz") as tar:
            tar.extractall(target, filter="data")
        return
    with zipfile.ZipFile(archive) as content:
        for name in content.namelist():
            if not (target / name).resolve().is_relative_to(target.resolve()):
                raise ValueError(f"{name} would land outside the folder")
        content.extractall(target)
