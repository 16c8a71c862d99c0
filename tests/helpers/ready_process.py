"""Processes that are ready at once: they are forked from one that has already imported what takes seconds.

They are real ones, to be signalled and killed. What the interpreter itself does before and after a program is not seen
in them: tests of that start ``python``.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
import weakref
from collections.abc import Callable
from multiprocessing import forkserver, get_context, set_start_method
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import IO, Any

import pytest

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 100  # seconds
_IMPORTED = ["utils.training.run", "models", "toy_runs", "torch._dynamo", "torch.distributed.launcher.api"]
_IMPORTED += ["datasets", "datasets.loading.decode", "torch.utils.tensorboard"]


class ReadyProcess:
    """Calls a function in a process of its own, whose current folder is the repository.

    Args:
        function: of a module; it and its arguments are pickled.
        stdout, stderr: open files to write to; by default pipes.
        environment: variables in addition to the tests' own.

    Attributes:
        stdout, stderr: where what it writes can be read.
        pid: its number.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        stdout: IO | None = None,
        stderr: IO | None = None,
        environment: dict[str, str] | None = None,
    ):
        (self.stdout, out), (self.stderr, err) = _stream(stdout), _stream(stderr)
        variables = os.environ | (environment or {})
        self._process = ready_context().Process(target=_call, args=(variables, out, err, function, arguments))
        self._process.start()
        self.pid = self._process.pid
        weakref.finalize(self, self._process.kill)  # at the latest at the end of the tests, which would wait for it
        out.close()
        err.close()

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        return self._process.exitcode

    def wait_for_line(self, beginning: str = "") -> None:
        """Until it has written one to standard output that begins so."""
        while line := self.stdout.readline():
            if line.startswith(beginning):
                return
        raise AssertionError(self.ending())

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Its exit code, once it has ended; one that takes too long is killed."""
        self._process.join(timeout)
        code = self.poll()
        self.kill()
        assert code is not None, f"still running after {timeout} s"
        return code

    def ending(self) -> tuple[int, str]:
        """Exit code, and what it wrote to standard error."""
        return self.wait(), self.stderr.read()

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def run_script(script: str, *words: str) -> None:
    """What ``python SCRIPT WORDS`` does, in this process."""
    sys.argv = [script, *words]
    runpy.run_path(script, run_name="__main__")


def run_module(module: str, *words: str) -> None:
    """What ``python -m MODULE WORDS`` does, in this process."""
    sys.argv = [module, *words]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def wait_for(condition: Callable[[], object], patience: float = PATIENCE) -> None:
    """Fails after so many seconds."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def ready_context() -> BaseContext:
    """To start processes with `multiprocessing`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (REPOSITORY, Path(__file__).parent))))
        forkserver.set_forkserver_preload(_IMPORTED)
        forkserver.ensure_running()
    return get_context("forkserver")


def _stream(file: IO | None) -> tuple[IO | None, Connection]:
    """Where to read what a process writes, if it is a pipe, and what it is to write to."""
    if file is not None:
        return None, Connection(os.dup(file.fileno()), readable=False)
    here, there = Pipe(duplex=False)
    return os.fdopen(os.dup(here.fileno()), encoding="utf-8"), there


def _call(variables: dict, out: Connection, err: Connection, function: Callable[..., Any], arguments: tuple) -> None:
    set_start_method(None, force=True)  # the default again, as a new process has it
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(REPOSITORY)
    for number, stream in ((1, out), (2, err)):
        os.dup2(stream.fileno(), number)
        stream.close()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  # until the process ends
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    function(*arguments)
