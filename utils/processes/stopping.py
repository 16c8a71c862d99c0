"""Stopping when asked to, at a step from which a run can go on.

SIGTERM (batch systems, ``docker stop``), SIGUSR1 (Slurm, before a time limit), SIGINT (Ctrl-C) and SIGHUP (a closed
terminal, unless nohup ignores it) ask a process to stop. While there is nothing to save, it stops at once; in training
the step under way is finished and saved first. All end with `EXIT_INTERRUPTED`.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from utils.processes.rank import launcher_is_gone, rank_info

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
    STOP_SIGNALS += (signal.SIGHUP,)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: stopped early, everything saved, try again
EXIT_KILLED = 128 + signal.SIGINT  # the code that a shell gives to a process that SIGINT ends
NOTHING_TO_SAVE = (
    "stopped outside of training, nothing to save; the same command goes on, with --resume if there is a checkpoint"
)
STOPPED_AT_ONCE = "stopped at once; --resume goes on from the last checkpoint, if there is one"

Handler = Callable[[int, FrameType | None], Any] | signal.Handlers


class Interrupted(BaseException):
    """The run was asked to stop and has nothing left to save; the message says how to resume.

    Like KeyboardInterrupt no `Exception`: code that recovers from errors must not recover from this.
    """


def interrupt_on_stop_signals() -> None:
    """From now on let these signals raise `Interrupted`; one of several processes just ends.

    Its launcher prints the message. The launcher may also have signalled it because another process failed.
    """
    _handle(signal.SIG_DFL if rank_info().world > 1 else _interrupt)


def ignore_stop_signals() -> None:
    """From now on ignore stop signals, so that this process comes to its end."""
    _handle(signal.SIG_IGN)


class StopRequest:
    """Remembers that a stop signal arrived, so that the step under way can be finished first.

    A second SIGINT stops at once. Use as a context manager; it restores the handlers that it found.

    Attributes:
        too_late: all is done; what `interrupt_on_stop_signals` has set is not restored, so that no signal ends a
            command between its last line and its end.
    """

    def __init__(self) -> None:
        self.too_late = False
        self._signalled = False
        self._found: dict[int, Handler] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal arrived, or the launcher of several processes has died."""
        return self._signalled or launcher_is_gone()

    def __enter__(self) -> StopRequest:
        self._found = _handle(self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._found.items():
            if not (self.too_late and handler is _interrupt):
                signal.signal(number, handler)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Within, a stop signal ends the process at once: nothing is to be saved. See `interrupt_on_stop_signals`.

        Raises:
            Interrupted: a signal has arrived before.
        """
        if self.requested:
            _interrupt()
        interrupt_on_stop_signals()
        try:
            yield
        finally:
            _handle(self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        leave_terminal(number)
        if self._signalled and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signalled = True


def leave_terminal(number: int) -> None:
    """After SIGHUP, write nothing more to the terminal, which is closed and answers with an error."""
    if number == signal.SIGHUP:
        for stream in (1, 2):
            # A closed terminal does not say any more that it is one.
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                silence(stream)


def silence(stream: int) -> None:
    """From now on throw away what is written to a file descriptor, which would answer with an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream)
    os.close(nowhere)


def _interrupt(number: int = 0, frame: FrameType | None = None) -> None:
    leave_terminal(number)
    raise Interrupted(NOTHING_TO_SAVE)


def _handle(handler: Handler) -> dict[int, Handler]:
    """Set the handler of all stop signals, and return the handlers that were there."""
    return {number: signal.signal(number, handler) for number in STOP_SIGNALS}
