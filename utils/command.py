"""What all commands share: the parser of their words, and one line for every error."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from utils.errors import (
    CONNECTION_LOST,
    Unforeseen,
    UserError,
    exhausted_memory,
    explain,
    lost_connection,
    printable,
    reason,
    traceback_clause,
)
from utils.processes.rank import (
    fail,
    introduce,
    rank_info,
    report_success,
    wait_for_the_cause,
)
from utils.processes.stopping import (
    EXIT_INTERRUPTED,
    EXIT_KILLED,
    STOPPED_AT_ONCE,
    Interrupted,
    ignore_stop_signals,
    interrupt_on_stop_signals,
    silence,
)

EXIT_UNEXPECTED = 1
EXIT_USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other error is reported: in one line, and by one process only."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help tells more")


def whole_number(least: int) -> Callable[[str], int]:
    """The ``type=`` of an argument that takes whole numbers from `least` on."""

    def parse(text: str) -> int:
        digits = text.removeprefix("-")
        # Python refuses to read integers of thousands of digits.
        if not (digits.isascii() and digits.isdigit() and len(digits) <= 20 and least <= int(text) < 2**31):
            raise argparse.ArgumentTypeError(f"found {text[:40]!r}, must be a whole number from {least} on")
        return int(text)

    return parse


def positive(kind: Callable[[str], Any] = float, most: float = math.inf) -> Callable[[str], Any]:
    """The ``type=`` of an argument that takes numbers above 0, up to `most`, read by `kind`."""

    def parse(text: str) -> Any:
        with suppress(ValueError, ArithmeticError):
            if 0 < (value := kind(text)) <= most:
                return value
        limit = "" if most == math.inf else f" and at most {most}"
        raise argparse.ArgumentTypeError(f"found {text[:40]!r}, must be a number above 0{limit}")

    return parse


def guarded(main: Callable[[], int | None], *, trains: bool = False) -> NoReturn:
    """Run `main` and exit. Any error, or a signal, is one line on standard error.

    The exit code is 2 for a `UserError`, of which an `Unforeseen` one has a file with the traceback, and for what the
    operating system refuses. It is 1 for any other error, whose traceback is in a file, too.

    Of several processes only the first one, or the first to fail, prints.

    Args:
        main: returns the exit code; None means 0.
        trains: it writes checkpoints, so the line says that they are kept and how to resume.
    """
    kept = "; checkpoints written before are kept" if trains else ""
    try:
        try:
            interrupt_on_stop_signals()
            sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # a daemon may have closed it
            if hasattr(sys.stdout, "reconfigure"):
                sys.stdout.reconfigure(errors="backslashreplace")  # a name that the encoding lacks must not end a run
            introduce()
            status = main() or 0
            sys.stdout.flush()
        finally:
            ignore_stop_signals()  # nothing is left to stop
    except UserError as error:
        kept_in = traceback_clause(error.__cause__) if isinstance(error, Unforeseen) else ""
        _leave(f"error: {error}{kept_in}", EXIT_USER_ERROR)
    except OSError as error:
        where = error.filename or ("standard output" if isinstance(error, BrokenPipeError) else "")
        _leave(f"error: {f'{where}: ' if where else ''}{reason(error)}{kept}", EXIT_USER_ERROR)
    except Interrupted as interruption:
        _leave(str(interruption) if trains else "stopped", EXIT_INTERRUPTED)
    except KeyboardInterrupt:
        _leave(STOPPED_AT_ONCE if trains else "stopped at once", EXIT_KILLED)
    except Exception as error:
        if line := exhausted_memory(error):
            _leave(f"error: {line}{kept}", EXIT_USER_ERROR)
        if rank_info().world > 1:
            wait_for_the_cause()
        if lost_connection(error):
            _leave(f"error: {CONNECTION_LOST}", EXIT_INTERRUPTED)
        _leave(f"error: {explain(error)}{kept}{traceback_clause(error)}", EXIT_UNEXPECTED)
    if status == 0:
        report_success()
    sys.exit(status)


def _leave(line: str, status: int) -> NoReturn:
    if rank_info().world > 1:
        fail(printable(line), status)
    for stream, text in ((sys.stderr, printable(line) + "\n"), (sys.stdout, "")):
        try:
            print(text, end="", file=stream, flush=True)  # on standard output where there is no other
        except OSError:  # what cannot be written must not be tried again by the interpreter's own clean-up
            silence(stream.fileno())
    sys.exit(status)
