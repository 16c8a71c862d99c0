"""Processes that decode pictures beside the training process."""

from __future__ import annotations

import itertools
import logging
import mmap
import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from multiprocessing.pool import ExceptionWithTraceback
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor

from utils.errors import UserError, reason
from utils.processes.stopping import STOP_SIGNALS

log = logging.getLogger("sakd")

AHEAD = 3  # jobs at each process: one under way, two to go on with while a batch is being used


class Workers:
    """Forked processes that do jobs; the results come in the order of the jobs.

    Each process has a pipe of its own for jobs and short results; pictures are written into `shared_images`. So nothing
    here needs a queue, a lock or space in ``/dev/shm``, of which a container may have 64 MB or none.

    A process that cannot be started is done without. Where none can be, the jobs are done here.

    Args:
        work: does one job.
        count: processes wanted; no more than there are CPU cores are started.
    """

    def __init__(self, work: Callable[[Any], Any], count: int):
        self._work = work
        self.count = min(count, _cores()) if "fork" in multiprocessing.get_all_start_methods() else 0
        self._processes: list[multiprocessing.Process] = []
        self._pipes: list[Connection] | None = None  # not started
        self._under_way: deque[int] = deque()
        self._turn: object = None
        # Also at the end of the program, before Python waits for its children: these ignore the signal that ends them.
        self._end = Finalize(self, _kill, args=(self._processes,), exitpriority=10)

    def map(self, jobs: Iterable[Any]) -> Iterator[Any]:
        """What `work` makes of each of the `jobs`. Calling this again ends the iteration before.

        A result may refer to shared memory until the next one is asked for: after that, later jobs may write there, of
        which ``AHEAD`` for each process are under way.

        Raises:
            UserError: a process died.
            Exception: what `work` raised.
        """
        if self._pipes is None:
            self._start()
        while self._under_way:
            self._receive()
        self._turn = turn = object()
        if not self._pipes:
            yield from map(self._work, jobs)
            return
        jobs, places = iter(jobs), itertools.cycle(range(len(self._pipes)))
        for job in itertools.islice(jobs, AHEAD * len(self._pipes)):
            self._send(next(places), job)
        while self._under_way:
            result = self._receive()
            if isinstance(result, Exception):
                raise result
            yield result
            if self._turn is not turn:
                return
            for job in itertools.islice(jobs, 1):
                self._send(next(places), job)

    def close(self) -> None:
        """End the processes. They hold nothing that could be lost."""
        self._end()
        for pipe in self._pipes or []:
            pipe.close()
        self._pipes = []
        self._under_way.clear()

    def _start(self) -> None:
        self._pipes = []
        # Until they ignore them: a handler of this process would raise its exception in the forked one.
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for _ in range(self.count):
                self._start_one()
        except OSError as error:
            # The half that is given back is room for what comes next: threads of PyTorch, checkpoints to write.
            for process in self._processes[len(self._processes) // 2 :]:
                process.kill()
                process.join()
                self._processes.remove(process)
                self._pipes.pop().close()
            left = len(self._pipes)
            log.warning(
                "no more processes can be started (%s): %s",
                reason(error),
                f"{left} of {self.count} decode the images" if left else "the training process decodes the images",
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)

    def _start_one(self) -> None:
        own, other = multiprocessing.Pipe()
        fork = multiprocessing.get_context("fork")  # the work need not be pickled
        process = fork.Process(target=_serve, args=(self._work, other, [*self._pipes, own]), daemon=True)
        try:
            process.start()
        except OSError:
            own.close()
            raise
        finally:
            other.close()
        self._processes.append(process)
        self._pipes.append(own)

    def _send(self, place: int, job: Any) -> None:
        try:
            self._pipes[place].send(job)
        except OSError:
            raise self._died(place) from None
        self._under_way.append(place)

    def _receive(self) -> Any:
        place = self._under_way.popleft()
        try:
            return self._pipes[place].recv()
        except (EOFError, OSError):
            raise self._died(place) from None

    def _died(self, place: int) -> UserError:
        process = self._processes[place]
        process.join(5)
        code = process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        self.close()
        return UserError(
            f"a process that decodes images died ({how}); is there enough memory? fewer of them, "
            "training.num_workers and validation.num_workers, need less"
        )


def shared_images(count: int, size: tuple[int, int]) -> Tensor:
    """Memory for images, uint8 ``[count, 3, H, W]``, in which processes forked later write what this one reads."""
    memory = mmap.mmap(-1, count * 3 * size[0] * size[1])
    return torch.frombuffer(memory, dtype=torch.uint8).view(count, 3, *size)


def _serve(work: Callable[[Any], Any], pipe: Connection, of_parent: list[Connection]) -> None:
    """Do what comes until the parent has closed its end of the pipe, or died."""
    # Ctrl-C and batch systems signal every process of a run. The training process decides when to stop, and needs its
    # workers for the step under way.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
    for other in of_parent:  # forked along: an end that is open here would keep the pipe open when the parent is gone
        other.close()
    torch.set_num_threads(1)  # the threads of the parent are not forked along
    try:
        while True:
            pipe.send(_done(work, pipe.recv()))
    except (EOFError, OSError):
        pass


def _done(work: Callable[[Any], Any], job: Any) -> Any:
    try:
        return work(job)
    except Exception as error:
        return ExceptionWithTraceback(error, error.__traceback__)  # which comes out of the pipe as the error itself


def _kill(processes: list[multiprocessing.Process]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
