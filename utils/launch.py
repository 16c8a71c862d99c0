"""Starting an entry point as several processes, and ending them as one.

    python -m utils.launch 4 train.py --dataset digits ...

The processes are started and watched by torchrun's own launcher; what it would print around an error, a page per
process, is replaced by the error. Plain ``torchrun`` works too, and is what several machines need.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from utils.processes.place import LAST_WORDS

EXIT_USAGE = 2
EXIT_SIGNALLED = 128  # plus the signal's number, as in a shell
STOP_SECONDS = "600"  # that a job may take to save itself when it is told to stop


def main(arguments: Sequence[str]) -> int:
    """``[number of processes, script, its arguments ...]``; replaces this process by the script if one will do."""
    if not arguments[1:]:
        return _usage_error("usage: python -m utils.launch <number of processes> <script> [argument ...]")
    count, *command = arguments
    if not (count.isascii() and count.isdigit() and int(count) > 0):
        return _usage_error(f"error: nproc: {count!r}, expected the number of processes, 1 or more")
    if int(count) == 1:
        os.execv(sys.executable, [sys.executable, *command])
    return launch(int(count), command)


def launch(count: int, command: Sequence[str]) -> int:
    """Run `command`, a script and its arguments, as `count` processes, and return the exit code of the job.

    One that fails ends the others. SIGTERM and SIGINT are handed on to all.
    """
    logging.disable()  # of this process alone: what torchrun says about failures
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", STOP_SECONDS)
    with tempfile.TemporaryDirectory(prefix="sakd-") as scratch:
        last_words = Path(scratch, "last-words")
        os.environ[LAST_WORDS] = str(last_words)
        problem, code = _run(count, command, scratch)
        if last_words.exists():
            return int(last_words.read_text())
    if problem:
        print(problem, file=sys.stderr)
    return code


def _run(count: int, command: Sequence[str], scratch: str) -> tuple[str, int]:
    """What is to be said of a job in which no process could say it, and the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=Path(scratch).name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",  # the machine's own name need not resolve
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=scratch),
    )
    try:
        elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return "", failure.exitcode
        name = signal.Signals(-failure.exitcode).name
        hint = "; is there enough memory?" if name == "SIGKILL" else ""
        return f"error: process {rank + 1} of {count} was ended by {name}{hint}", EXIT_SIGNALLED - failure.exitcode
    except SignalException as error:
        return f"stopped by {error.sigval.name} outside of training", EXIT_SIGNALLED + error.sigval
    return "", 0


def _usage_error(message: str) -> int:
    print(message, file=sys.stderr)
    return EXIT_USAGE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
