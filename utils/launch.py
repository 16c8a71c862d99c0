"""Start an entry point as several processes, and end them as one.

    python -m utils.launch 4 train.py --dataset digits ...      # four processes
    python -m utils.launch 2x4 train.py --dataset digits ...    # two machines with four processes each

torchrun's own launcher starts and watches the processes. It would print a page for each process around an error; this
prints the error alone. Plain ``torchrun`` works too.
"""

from __future__ import annotations

import logging
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from utils.command import guarded
from utils.errors import CONNECTION_LOST, UserError
from utils.processes.rank import SCRATCH, VARIABLES, thread_share
from utils.processes.rendezvous import rendezvous_of
from utils.processes.stopping import (
    EXIT_INTERRUPTED,
    EXIT_KILLED,
    NOTHING_TO_SAVE,
    STOP_SIGNALS,
    STOPPED_AT_ONCE,
    ignore_stop_signals,
    leave_terminal,
)

EXIT_SIGNALLED = 128  # plus the signal's number, as in a shell
STOP_SECONDS = "600"  # that a job may take to save itself when it is told to stop


def main(arguments: Sequence[str] | None = None) -> int:
    """``[number of processes, script, its arguments ...]``; a single process is this one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments[1:]:
        raise UserError("usage: python -m utils.launch [<machines>x]<processes> <script> [argument ...]")
    counts, *command = arguments
    nodes, sign, count = counts.rpartition("x")
    nodes = nodes if sign else "1"
    for name, found, what in (("nnodes", nodes, "machines"), ("nproc", count, "processes")):
        if not re.fullmatch("[1-9][0-9]{0,3}", found, re.ASCII):
            raise UserError(f"{name}: {found[:40]!r}, expected the number of {what}, 1 or more")
    for name in VARIABLES:  # another program may have left them
        os.environ.pop(name, None)
    if int(nodes) > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of warnings when a machine is lost
        return launch(int(count), command, int(nodes), rendezvous_of(int(nodes), os.environ))
    if int(count) > 1:
        return launch(int(count), command)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    return 0


def launch(count: int, command: Sequence[str], nodes: int = 1, rendezvous: dict[str, Any] | None = None) -> int:
    """Run `command`, a script and its arguments, as `count` processes, and return the exit code of the job.

    A process that fails ends the others. Stop signals are handed on to all; a second SIGINT ends all at
    once.

    Args:
        count: processes on this machine.
        command: for Python.
        nodes: machines; the same is done on each.
        rendezvous: of the machines, see `rendezvous_of`.
    """
    logging.disable()  # of this process alone: torchrun logs failures
    os.environ.update(thread_share(count))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS)
    with tempfile.TemporaryDirectory(prefix="sakd-") as scratch:
        os.environ[SCRATCH] = scratch
        # A machine's own name need not resolve.
        here = {"rdzv_endpoint": "localhost:0", "run_id": Path(scratch).name, "local_addr": "localhost"}
        problem, code = _run(count, command, scratch, nodes, rendezvous or here)
        last_words = Path(scratch, "last-words")
        if last_words.exists():  # a process has printed them
            return int(last_words.read_text() or code)
        if code == EXIT_INTERRUPTED and Path(scratch, "success").exists():  # the signal came too late
            return 0
    if problem:
        print(problem, file=sys.stderr)
    return code


def _run(count: int, command: Sequence[str], scratch: str, nodes: int, rendezvous: dict[str, Any]) -> tuple[str, int]:
    """The line for a job in which no process could print one, and the exit code."""
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=count,
        rdzv_backend="c10d",
        **rendezvous,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
        signals_to_handle="",  # see `_hand_on_signals`
    )
    _hand_on_signals(scratch)
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return "", failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = "; is there enough memory?" if name == "SIGKILL" else ""
        which = f"process {rank + 1} of {count * nodes}"
        return f"error: {which} was ended by {name}{hint}", EXIT_SIGNALLED - failure.exitcode
    except SignalException:
        return NOTHING_TO_SAVE, EXIT_INTERRUPTED
    except (RendezvousError, DistNetworkError):
        return (
            f"error: no answer from {rendezvous['rdzv_endpoint']}, the rendezvous of the machines: {CONNECTION_LOST}",
            EXIT_INTERRUPTED,
        )
    finally:
        ignore_stop_signals()
    return "", 0


def _hand_on_signals(scratch: str) -> None:
    """Let the first signal stop the job as torchrun would, and a second SIGINT end all processes of this machine.

    torchrun would go on waiting for the others.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        leave_terminal(number)
        if asked and number == signal.SIGINT:
            for file in Path(scratch).glob("pid-*"):
                with suppress(ProcessLookupError):
                    os.kill(int(file.name.removeprefix("pid-")), signal.SIGKILL)
            print(STOPPED_AT_ONCE, file=sys.stderr, flush=True)
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(EXIT_KILLED)
        if asked:  # a batch system may send several; torchrun's own end must not be interrupted
            return
        asked = True
        raise SignalException("asked to stop", signal.Signals(number))

    for number in STOP_SIGNALS:
        signal.signal(number, hand_on)


if __name__ == "__main__":
    guarded(main, trains=True)
