"""Processes that decode pictures beside the training process.

PyTorch's DataLoader is not used: a program hangs at its end where one of its processes could not be started, its
handler of SIGCHLD raises errors in the middle of a step or a checkpoint, and it needs semaphores and room for batches
in ``/dev/shm``, of which a container may have 64 MB or none.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.util import Finalize
from typing import Any, TypeAlias

import torch
from torch import Tensor

from utils.errors import UserError, reason
from utils.processes.stopping import STOP_SIGNALS

log = logging.getLogger("sakd")

AHEAD = 3  # jobs at each process: one under way, two to go on with while a batch is being used


Worker: TypeAlias = tuple[multiprocessing.Process, Connection]  # and our end of the pipe for its jobs and results


class Workers:
    """Forked processes that do jobs; the results come in the order of the jobs.

    Pictures are written into `image_memory`. A process that cannot be started is done without. Where none can be, the
    jobs are done here.

    Args:
        work: does one job.
        count: processes wanted; no more than there are CPU cores are started.
    """

    def __init__(self, work: Callable[[Any], Any], count: int):
        self._work = work
        self.count = min(count, _cores()) if "fork" in multiprocessing.get_all_start_methods() else 0
        self._is_started = False
        self._workers: list[Worker] = []
        self._under_way: deque[Worker] = deque()  # for each job, who does it
        self._turn: object = None
        # Also at the end of the program, before Python waits for its children: these ignore the signal that ends them.
        self._end = Finalize(self, _kill, args=(self._workers,), exitpriority=10)

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """What `work` makes of each of the `jobs`. Calling this again ends the iteration before.

        A result may refer to shared memory until the next one is asked for: after that, later jobs may write there, of
        which ``AHEAD`` for each process are under way.

        Raises:
            UserError: a process died.
            Exception: what `work` raised.
        """
        if not self._is_started:
            self._start()
        while self._under_way:
            self._receive()
        self._turn = turn = object()
        if not self._workers:
            yield from map(self._work, jobs)
            return
        todo = zip(jobs, itertools.cycle(self._workers))
        self._send(itertools.islice(todo, AHEAD * len(self._workers)))
        while self._under_way:
            result = self._receive()
            if isinstance(result, Exception):
                raise result
            yield result
            if self._turn is not turn:
                return
            self._send(itertools.islice(todo, 1))

    def close(self) -> None:
        """End the processes. They hold nothing that could be lost."""
        self._end()
        self._workers.clear()
        self._under_way.clear()

    def _start(self) -> None:
        self._is_started = True
        fork = multiprocessing.get_context("fork")  # the work need not be pickled
        # Blocked for good in the workers: Ctrl-C and batch systems signal every process of a run. The training process
        # decides when to stop, and needs its workers for the step under way.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for _ in range(self.count):
                own, other = fork.Pipe()
                with closing(other):
                    process = fork.Process(target=_serve, args=(self._work, other, own), daemon=True)
                    process.start()
                self._workers.append((process, own))
        except OSError as error:
            # The half that is given back is room for what comes next: threads of PyTorch, checkpoints to write.
            left = len(self._workers) // 2
            _kill(self._workers[left:])
            del self._workers[left:]
            who = f"{left} of {self.count}" if left else "the training process"
            log.warning("no more processes can be started (%s): images are decoded by %s", reason(error), who)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def _send(self, todo: Iterable[tuple[Any, Worker]]) -> None:
        for job, worker in todo:
            self._under_way.append(worker)
            with suppress(OSError):  # it died, which shows when its result is due
                worker[1].send(job)

    def _receive(self) -> Any:
        process, pipe = self._under_way.popleft()
        try:
            return pipe.recv()
        except (EOFError, OSError):
            process.join(5)
            code = process.exitcode
            self.close()
            how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
            raise UserError(
                f"a process that decodes images died ({how}); is there enough memory? fewer of them, "
                "training.num_workers and validation.num_workers, need less"
            ) from None


def map_in_workers(work: Callable[[Any], Any], jobs: Sequence[Any], count: int) -> Iterator[Any]:
    """What `work` makes of each of the `jobs`, by at most `count` processes that end with the iteration."""
    with closing(Workers(work, min(count, len(jobs)))) as workers:
        yield from workers.map(jobs)


def image_memory(count: int, size: tuple[int, int]) -> Tensor:
    """Memory for images, uint8 ``[count, 3, H, W]``, in which processes forked later write what this one reads."""
    memory = mmap.mmap(-1, count * 3 * size[0] * size[1])
    return torch.frombuffer(memory, dtype=torch.uint8).view(count, 3, *size)


def _serve(work: Callable[[Any], Any], pipe: Connection, of_parent: Connection) -> None:
    """Do what comes until the parent has closed its end of the pipe, or died."""
    of_parent.close()  # forked along, it would keep the pipe open when the parent is gone
    torch.set_num_threads(1)  # the threads of the parent are not forked along
    with suppress(EOFError, OSError):
        while True:
            pipe.send(_result(work, pipe.recv()))


def _result(work: Callable[[Any], Any], job: Any) -> Any:
    try:
        return work(job)
    except Exception as error:
        return ExceptionWithTraceback(error, error.__traceback__)  # which comes out of the pipe as the error itself


def _kill(workers: list[Worker]) -> None:
    for process, _ in workers:
        process.kill()
    for process, _ in workers:
        process.join()


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
