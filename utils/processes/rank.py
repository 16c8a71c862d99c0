"""Which of the processes of a job this one is, and how it ends the job."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

PATIENCE = 2.0  # seconds in which the launcher, which looks ten times a second, notices the end of another process
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set by torchrun
SCRATCH = "SAKD_SCRATCH"  # environment variable: the folder in which the processes of a machine and `utils.launch` talk
SHARED_THREADS = "SAKD_SHARED_THREADS"  # environment variable: not the user, but `thread_share` chose OMP_NUM_THREADS
_launcher: int | None = None  # process id of the parent of this process of several


class RankInfo(NamedTuple):
    """Which one of how many processes this is.

    Attributes:
        rank: counted from 0 over all machines.
        local_rank: counted from 0 on this machine.
        world: number of processes.
    """

    rank: int
    local_rank: int
    world: int


def rank_info() -> RankInfo:
    """The number of this process in the job; ``RankInfo(0, 0, 1)`` if it was started alone."""
    texts = [os.environ.get(name) or "0" for name in VARIABLES]
    numbers = RankInfo(*map(int, texts)) if all(text.isdecimal() for text in texts) else RankInfo(0, 0, 1)
    return numbers if numbers.world > 1 else RankInfo(0, 0, 1)


def thread_share(processes: int, cores: int | None = None) -> dict[str, str]:
    """Environment of each of several processes on this machine: its share of the cores; empty if the user has chosen.

    Processes that each take all cores are slower than one after another.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    threads = max(1, (cores or os.cpu_count() or 1) // processes)
    return {"OMP_NUM_THREADS": str(threads), SHARED_THREADS: "1"}


def introduce() -> None:
    """Tell `utils.launch` the number of this process; let only the first process of a job write to standard output.

    Errors go to standard error.
    """
    global _launcher
    if rank_info().world > 1:
        _launcher = os.getppid()
        _write(f"pid-{os.getpid()}", "")
    if rank_info().rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def launcher_is_gone() -> bool:
    """Whether this is one of several processes and their launcher has died: nobody else would stop them."""
    return _launcher is not None and os.getppid() != _launcher


def wait_for_the_cause() -> None:
    """Give the launcher time to end this process: its failure may only be the consequence of another one's end."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(PATIENCE)


def fail(message: str, code: int) -> NoReturn:
    """End this process of a job, and thereby the job. The first process that fails prints, the others are silent.

    Nothing is torn down: the destructors of a broken job wait for processes that will never answer.

    Args:
        message: for standard error.
        code: exit code, of the job as well.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another process's exit must not cut the message off
    if _write("last-words", str(code)):
        print(message, file=sys.stderr, flush=True)
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(code)


def report_success() -> None:
    """Tell the launcher that the job is done, so that a signal that arrives from now on is no failure."""
    if rank_info().local_rank == 0:
        _write("success", "")


def _write(name: str, text: str) -> bool:
    """Make a file in the scratch folder; False if another process has made it."""
    with suppress(KeyError, OSError):  # of plain torchrun; no space
        try:
            with open(Path(os.environ[SCRATCH], name), "x") as file:
                file.write(text)
        except (FileExistsError, FileNotFoundError):
            return False
    return True
