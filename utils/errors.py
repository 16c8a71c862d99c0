"""Errors that are meant for the person at the keyboard."""

import re

# PyTorch raises RuntimeErrors: about a GPU, about a CPU, and about a size whose bytes no 64-bit number counts.
_MEMORY_EXHAUSTED = (
    "out of memory",
    "not enough memory",
    "DefaultCPUAllocator",
    "Storage size calculation overflowed",
    "integer multiplication overflow",
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


def printable(text: str) -> str:
    """`text` with line breaks and control characters spelt out, e.g. as ``\\n``."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def reason(error: BaseException, limit: int = 160) -> str:
    """What `error` says, for use within a line: blanks for line breaks, and cut if it is long."""
    text = getattr(error, "strerror", None) or " ".join(str(error).split())
    text = text.partition(" Search for `cuda")[0]  # PyTorch's advice after the message of a CUDA error
    if " " not in text:  # "101" says nothing, "KeyError: 101" little, but what to look for
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
