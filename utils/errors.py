"""Errors that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: wrong input, a missing file, an impossible value.

    The message says what is wrong, where, and what would do. Entry points print it without a traceback and exit with
    code 2 (see `utils.cli`).

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
    text = getattr(error, "strerror", None) or " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."
