"""Which of the processes of a job this one is, and how it ends the job."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress
from typing import NamedTuple, NoReturn

PATIENCE = 2.0  # seconds in which the launcher, which looks ten times a second, notices the end of another process
LAST_WORDS = "SAKD_LAST_WORDS"  # environment variable: the file that the first process to fail makes


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
    rank, local_rank, world = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return RankInfo(rank, local_rank, max(world, 1))


def keep_quiet_unless_first() -> None:
    """Let only the first process of a job write to standard output. Errors go to standard error."""
    if rank_info().rank:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # until the process ends


def fail(message: str, code: int, *, perhaps_not_the_cause: bool = False) -> NoReturn:
    """End this process of a job, and thereby the job. The first process that fails prints, the others are silent.

    Nothing is torn down: the destructors of a broken job wait for processes that will never answer.

    Args:
        message: for standard error.
        code: exit code, of the job as well.
        perhaps_not_the_cause: the failure may be but the echo of another process's end. That one is given the time
            to be noticed, whereupon the launcher ends this one before it says a word.
    """
    if perhaps_not_the_cause:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(PATIENCE)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # another process's exit must not cut the message off
    if _is_first_to_fail(code):
        print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)


def _is_first_to_fail(code: int) -> bool:
    path = os.environ.get(LAST_WORDS)
    if path is None:  # plain torchrun
        return True
    with suppress(FileExistsError), open(path, "x") as file:
        file.write(str(code))
        return True
    return False
