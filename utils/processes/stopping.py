"""Stopping when asked to, at a place from which one can go on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped early, everything saved, try again
EXIT_KILLED = 128 + signal.SIGINT  # what a shell makes of a process that SIGINT ends


class Interrupted(BaseException):
    """The run was asked to stop and has nothing left to save; the message says how to resume.

    Like KeyboardInterrupt no `Exception`: code that recovers from errors must not recover from this.
    """


@contextmanager
def stoppable() -> Iterator[None]:
    """Let SIGTERM raise `Interrupted` where no `StopRequest` is active, that is before and after training."""
    usual = signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, usual)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Interrupted(
        "stopped outside of training, nothing to save; the same command goes on, with --resume if there is a checkpoint"
    )


class StopRequest:
    """Remembers that SIGTERM or SIGINT arrived, so that the step under way can be finished first.

    A second SIGINT stops at once. Use as a context manager; it restores the handlers that it found.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
