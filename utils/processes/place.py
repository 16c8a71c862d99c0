"""Which of the processes of a job this one is, and how it ends the job."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, NoReturn

PATIENCE = 2.0  # seconds in which the launcher, which looks ten times a second, notices the end of another process
# Environment variables by which `utils.launch` tells its processes
LAUNCHER = "SAKD_LAUNCHER"  # who it is: its process id
LAST_WORDS = "SAKD_LAST_WORDS"  # the file that the first process to fail makes
SUCCESS = "SAKD_SUCCESS"  # the file that the first process of this machine makes once the job is done

# What a process is sent when its launcher dies: it is not in the session of a terminal, which would send the same.
# It may be sent several times, as one thread of the launcher ends after the other.
LAUNCHER_DIED = signal.SIGHUP
_PR_SET_PDEATHSIG = 1  # of Linux's sys/prctl.h


class RankInfo(NamedTuple):
    """Which one of how many processes this is, by the variables that torchrun sets.

    Attributes:
        rank: counted from 0 over all machines.
        local_rank: counted from 0 on this machine.
        world: number of processes.
    """

    rank: int
    local_rank: int
    world: int


def rank_info() -> RankInfo:
    """Where this process stands in the job; ``RankInfo(0, 0, 1)`` if it was started alone."""
    rank, local_rank, world = (int(os.environ.get(name) or 0) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return RankInfo(rank, local_rank, max(world, 1))


def keep_quiet_unless_first() -> None:
    """Let only the first process of a job write to standard output. Errors go to standard error."""
    if rank_info().rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def end_with_launcher() -> None:
    """Let the death of the launcher, however it comes about, stop this process of several, see `StopRequest` (Linux).

    The processes of a job are not in the session of its launcher, so nothing else would end them.
    """
    if rank_info().world == 1 or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, LAUNCHER_DIED)
    if os.environ.get(LAUNCHER, str(os.getppid())) != str(os.getppid()):  # it died before
        os._exit(1)


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
    if _is_first_to_fail(code):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def report_success() -> None:
    """Tell the launcher that the job is done, so that a signal that arrives from now on is no failure."""
    if SUCCESS in os.environ and rank_info().local_rank == 0:
        Path(os.environ[SUCCESS]).touch()


def _is_first_to_fail(code: int) -> bool:
    path = os.environ.get(LAST_WORDS)
    if path is None:  # plain torchrun
        return True
    with suppress(FileExistsError, FileNotFoundError), open(path, "x") as file:
        file.write(str(code))
        return True
    return False
