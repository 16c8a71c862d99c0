"""Log lines: on the console, and in the log file of a run. Imported before PyTorch."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from logging.handlers import MemoryHandler
from pathlib import Path

from tqdm import tqdm

from utils.errors import UserError
from utils.files import naming
from utils.processes.stopping import Interrupted, silence

log = logging.getLogger("sakd")


class ConsoleHandler(logging.Handler):
    """Lines on standard output, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except BrokenPipeError:  # `tee` or `ssh` has ended, which is as if the terminal were closed
            silence(sys.stdout.fileno())
            os.kill(os.getpid(), signal.SIGHUP)


class LogFileHandler(logging.FileHandler):
    """Raises the errors of writing, e.g. that the disk is full, where `logging` would print each and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        with naming(Path(self.baseFilename)):
            raise  # called by `logging` in its `except` block


# Keeps the lines that come before there is a log file.
_early_lines = MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL + 1)


def log_to_console() -> None:
    """Send the project's log lines to standard output, once."""
    if not log.handlers:
        handler = ConsoleHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.addHandler(_early_lines)
        log.setLevel(logging.INFO)


@contextmanager
def set_aside() -> Iterator[None]:
    """Keep the lines that came so far for the first log file after those within."""
    before, _early_lines.buffer = _early_lines.buffer, []
    try:
        yield
    finally:
        _early_lines.buffer = before + _early_lines.buffer


@contextmanager
def log_to_file(file: Path) -> Iterator[None]:
    """Append the log lines to `file` as well, those that came before first, and why the run ends early if it does."""
    handler = LogFileHandler(file, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.removeHandler(_early_lines)
    log.addHandler(handler)
    try:
        _early_lines.setTarget(handler)
        _early_lines.flush()
        yield
    except (UserError, Interrupted) as error:  # the console is about to be told
        with suppress(OSError):  # the disk may be full
            handler.handle(log.makeRecord(log.name, logging.INFO, "", 0, str(error), (), None))
        raise
    finally:
        _early_lines.setTarget(None)
        log.removeHandler(handler)
        log.addHandler(_early_lines)
        with suppress(OSError):  # what was written is flushed; the rest failed already
            handler.close()
