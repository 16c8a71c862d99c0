"""Errors that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
import os
import re
import sysconfig
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

# PyTorch raises RuntimeErrors: about a GPU, about a CPU, and about a size whose bytes exceed a 64-bit number.
_MEMORY_EXHAUSTED = (
    "out of memory",
    "not enough memory",
    "was unable to find an engine to execute this computation",  # cuDNN: FIND and GET, for want of a workspace
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
    "integer multiplication overflow",
    "failed to map segment",  # of a library that is imported
)

CONNECTION_LOST = (
    "the connection to the processes of another machine is lost; --resume goes on from the last checkpoint, if there "
    "is one, with the machines that are left"
)
# How gloo and NCCL put it.
_CONNECTION_LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out waiting",
    "remote process exited",
    "ncclRemoteError",
)


class UserError(Exception):
    """Something the user can put right: wrong input, a missing file, an impossible value.

    The message says what is wrong, where, and what would do. Entry points print it without a traceback and exit with
    code 2 (see `utils.command`).

    Args:
        message: made one line, whatever names and values it quotes.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


class Unforeseen(UserError):
    """What `doing` makes of an error that no check expects. The error itself is the `__cause__`."""


@contextmanager
def doing(what: str) -> Iterator[None]:
    """Turn whatever goes wrong within into one line, ``<what> failed: <reason>``.

    This is for the few places that touch the outside: files, and code that is not ours. A UserError passes unchanged,
    since it says more. So do exhausted memory and a lost connection, for which `utils.command.guarded` has words.

    Args:
        what: e.g. ``"reading run/digits/1029/resnet20/config.yml"``.

    Raises:
        UserError: the operating system refused something.
        Unforeseen: anything else was raised; the line names the place in a file outside of `utils` and libraries.
    """
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        file = "" if error.filename is None or str(error.filename) in what else f"{error.filename}: "
        raise UserError(f"{what} failed: {file}{reason(error)}") from error
    except (Exception, SystemExit) as error:  # an imported file may be a program that exits
        if exhausted_memory(error) or lost_connection(error):
            raise
        raise Unforeseen(f"{what} failed: {explain(error)}") from error


def did_you_mean(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """``": did you mean 'vgg8'?"`` with the one of `known` that is closest to `word`; empty if none is.

    Args:
        cutoff: how similar it must be, from 0 to 1, see `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f": did you mean {close[0]!r}?" if close else ""


def enumerate_some(names: Sequence[str], limit: int = 5) -> str:
    """``a, b, c``, or the first few and how many more."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def explain(error: BaseException) -> str:
    """Kind, message and place of an error that nobody expected, e.g. ``"KeyError: 101 (mynet.py, line 12)"``."""
    text = reason(error)
    kind = type(error).__name__
    return f"{text if text.startswith(kind) else f'{kind}: {text}'}{place_in_code(error)}"


def place_in_code(error: BaseException) -> str:
    """The last line outside of `utils` and libraries that `error` came from: ``" (mynet.py, line 12)"``, or nothing."""
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    skipped = (*libraries, os.path.dirname(os.path.abspath(__file__)), "<frozen")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(skipped):
            file = os.path.relpath(frame.filename) if frame.filename.startswith(os.getcwd()) else frame.filename
            return f" ({file}, line {frame.lineno})"
    return ""


def traceback_clause(error: BaseException) -> str:
    """``"; traceback: FILE"``, a new file among the temporary ones; empty where that is not possible."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="sakd-traceback-", suffix=".txt", delete=False, encoding="utf-8", errors="backslashreplace"
        ) as file:
            file.writelines(traceback.format_exception(error))
            return f"; traceback: {file.name}"
    except OSError:
        return ""


def printable(text: str) -> str:
    """`text` with line breaks and control characters spelt out, e.g. as ``\\n``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def reason(error: BaseException, limit: int = 160) -> str:
    """What `error` says, for use within a line: blanks for line breaks, and cut if it is long."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    text = text.partition(" Search for `cuda")[0]  # PyTorch's advice after the message of a CUDA error
    if " " not in text:  # "101" alone does not help, "KeyError: 101" can be looked up
        text = ": ".join(filter(None, [type(error).__name__, text]))
    return text if len(text) <= limit else text[: limit - 3] + "..."


def exhausted_memory(error: BaseException) -> str | None:
    """A phrase that says so if `error` is how Python, NumPy or PyTorch report that memory is exhausted, else None."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(words in text for words in _MEMORY_EXHAUSTED):
        return None
    tried = re.search(r"allocate ([\d.]+ \w+)", text)
    return "out of memory" + (f" (tried to allocate {tried[1]})" if tried else "")


def lost_connection(error: BaseException) -> bool:
    """Whether `error` is how PyTorch reports that a process of a job does not answer any more."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _CONNECTION_LOST)
