"""Starting an entry point as several processes, and ending them as one.

    python -m utils.launch 4 train.py --dataset digits ...      # four processes
    python -m utils.launch 2x4 train.py --dataset digits ...    # on each of two machines, four on either

The processes are started and watched by torchrun's own launcher; what it would print around an error, a page per
process, is replaced by the error. Plain ``torchrun`` works too.
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
from pathlib import Path
from types import FrameType

from utils.errors import CONNECTION_LOST, UserError
from utils.processes.meeting import Meeting, meeting_of
from utils.processes.place import LAST_WORDS, LAUNCHER, SUCCESS
from utils.processes.stopping import (
    EXIT_INTERRUPTED,
    EXIT_KILLED,
    NOTHING_TO_SAVE,
    STOP_SIGNALS,
    STOPPED_AT_ONCE,
    Interrupted,
    ignore_stop_signals,
    interrupt_on_stop_signals,
)

EXIT_USAGE = 2
EXIT_SIGNALLED = 128  # plus the signal's number, as in a shell
STOP_SECONDS = "600"  # that a job may take to save itself when it is told to stop


def main(arguments: Sequence[str]) -> int:
    """``[number of processes, script, its arguments ...]``; runs the script in this process if one will do."""
    if not arguments[1:]:
        return _usage_error("usage: python -m utils.launch [<machines>x]<processes> <script> [argument ...]")
    counts, *command = arguments
    nodes, sign, count = counts.rpartition("x")
    nodes = nodes if sign else "1"
    for name, found, what in (("nnodes", nodes, "machines"), ("nproc", count, "processes")):
        if not re.fullmatch("[1-9][0-9]{0,3}", found, re.ASCII):
            return _usage_error(f"error: {name}: {found[:40]!r}, expected the number of {what}, 1 or more")
    if int(nodes) > 1:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else pages of warnings when a machine is lost
        try:
            return launch(int(count), command, int(nodes), meeting_of(int(nodes), os.environ))
        except UserError as error:
            return _usage_error(f"error: {error}")
    if int(count) > 1:
        return launch(int(count), command)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")
    return 0


def launch(count: int, command: Sequence[str], nodes: int = 1, meeting: Meeting | None = None) -> int:
    """Run `command`, a script and its arguments, as `count` processes, and return the exit code of the job.

    With `nodes`, the same is done on other machines, which meet at `meeting`.

    One that fails ends the others. SIGTERM, SIGUSR1 and SIGINT are handed on to all; a second SIGINT ends all at once.
    """
    logging.disable()  # of this process alone: what torchrun says about failures
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS)
    with tempfile.TemporaryDirectory(prefix="sakd-") as scratch:
        last_words, success = Path(scratch, "last-words"), Path(scratch, "success")
        os.environ |= {LAUNCHER: str(os.getpid()), LAST_WORDS: str(last_words), SUCCESS: str(success)}
        # A machine's own name need not resolve.
        meeting = meeting or Meeting("localhost:0", Path(scratch).name, "localhost", None)
        problem, code = _run(count, command, scratch, nodes, meeting)
        if last_words.exists():
            return int(last_words.read_text())
        if code == EXIT_INTERRUPTED and success.exists():  # the signal came too late
            return 0
    if problem:
        print(problem, file=sys.stderr)
    return code


def _run(count: int, command: Sequence[str], scratch: str, nodes: int, meeting: Meeting) -> tuple[str, int]:
    """What is to be said of a job in which no process could say it, and the exit code."""
    from torch.distributed import DistNetworkError
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=count,
        run_id=meeting.run_id,
        rdzv_backend="c10d",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={} if meeting.is_host is None else {"is_host": meeting.is_host},
        local_addr=meeting.address,
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
        return f"error: no answer from {meeting.endpoint}, where the machines meet: {CONNECTION_LOST}", EXIT_INTERRUPTED
    finally:
        ignore_stop_signals()
    return "", 0


def _hand_on_signals(scratch: str) -> None:
    """Let the first signal stop the job as torchrun would, and a second SIGINT end this process.

    Its death stops the others at once, see `StopRequest`; torchrun would go on waiting for them.
    """
    from torch.distributed.elastic.multiprocessing import SignalException

    asked = False

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked and number == signal.SIGINT:
            print(STOPPED_AT_ONCE, file=sys.stderr, flush=True)
            shutil.rmtree(scratch, ignore_errors=True)
            os._exit(EXIT_KILLED)
        if asked:  # a batch system may send several; torchrun's own end must not be interrupted
            return
        asked = True
        raise SignalException("asked to stop", signal.Signals(number))

    for number in STOP_SIGNALS:
        signal.signal(number, hand_on)


def _usage_error(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    interrupt_on_stop_signals()
    try:
        sys.exit(main(sys.argv[1:]))
    except Interrupted as interruption:
        print(interruption, file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
