"""Errors that are meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: wrong input, a missing file, an impossible value.

    The message is one line that says what is wrong, where, and what would do. Entry points print it
    without a traceback and exit with code 2 (see `utils.cli`).
    """
