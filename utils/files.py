"""Writing files so that neither a dying process nor a power cut leaves half of one behind, and reading only files."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import BinaryIO

from utils.errors import UserError

TEMPORARY = ".*.tmp"  # what a killed process may leave

# What a file system answers that cannot do what it is asked: some network and FUSE file systems cannot flush a folder,
# or lock a file.
UNSUPPORTED = (errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


def check_regular(path: str | os.PathLike, *, follow_links: bool = True) -> None:
    """Refuse what is no ordinary file before it is opened: a pipe keeps its reader waiting, a device never ends.

    Raises:
        UserError: it is something else.
        OSError: it is not there, or cannot be looked at.
    """
    if not stat.S_ISREG(os.stat(path, follow_symlinks=follow_links).st_mode):
        raise UserError(f"{os.fspath(path)}: is a folder, a link, a pipe or a device, expected a file")


def identity(path: str | os.PathLike) -> tuple[int, int]:
    """Tells real files and folders apart, however many links lead to them."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def refuse_to_replace(files: Sequence[Path], sign: Path, mark: str) -> None:
    """Raise a UserError if one of `files` is there and was not written by us.

    Args:
        files: what is to be written.
        sign: one of them, a text.
        mark: words that `sign` holds if we wrote it, and so the others.
    """
    there = [file for file in files if os.path.lexists(file)]
    if there and not _holds(sign, mark):
        raise UserError(f"{there[0]}: exists already, and {sign.name} is none of this command; name another place")


def _holds(file: Path, mark: str) -> bool:
    try:
        check_regular(file, follow_links=False)
        return mark in file.read_text(errors="replace")
    except (OSError, UserError):
        return False


def check_writable(folder: Path) -> None:
    """Raise a UserError if nothing can be written to `folder`, or it cannot be made; before what takes long."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not os.path.isdir(there) or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: cannot write there; name another place")


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put `path` into the errors of writing, which do not say of themselves what was being written."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextlib.contextmanager
def replacing(path: Path, also: Sequence[Path] = ()) -> Iterator[BinaryIO]:
    """A file to write to, which takes the name `path` once it is complete and on disk, and not at all otherwise.

    Args:
        path: its name.
        also: further names, taken before `path`: where `path` is the new file, so are these.
    """
    temporary = _beside(path)
    try:
        temporary.unlink(missing_ok=True)
        with naming(path), temporary.open("xb") as file:  # fails if there is a link, which may lead to any file
            yield file
            file.flush()
            os.fsync(file.fileno())
        for name in also:
            publish_copy(temporary, name)
        temporary.replace(path)
        _sync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):  # gone by now if all went well
            temporary.unlink()


def publish_copy(source: Path, target: Path) -> None:
    """Make `target` the same file as `source` is now, atomically; a hard link where the file system has them."""
    temporary = _beside(target)
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Make `text` the content of the file, atomically."""
    write_bytes(path, text.encode(errors="surrogateescape"))  # names of files need not be UTF-8


def write_bytes(path: Path, content: bytes) -> None:
    """Make `content` the content of the file, atomically."""
    with replacing(path) as file:
        file.write(content)


def append_line(path: Path, line: str) -> None:
    """Add a line and wait until it is on disk, so that no checkpoint written later can be older than it."""
    with naming(path), path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes did not finish writing. Only for a folder that nobody else writes to."""
    for path in folder.glob(TEMPORARY):
        path.unlink()


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _sync_directory(folder: Path) -> None:
    # A rename is on disk only once its directory is.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
        warn_once(f"{folder}: this file system cannot flush a folder; a power cut may undo the newest files there")
    finally:
        os.close(descriptor)


@cache
def warn_once(line: str) -> None:
    """Log a warning, once in a process for each `line`."""
    logging.getLogger("sakd").warning(line)
