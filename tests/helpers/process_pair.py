"""Two processes in one group, which run the functions that they are told to."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from ready_process import PATIENCE, ready_context

from utils.processes.group import process_group

_group = ExitStack()  # which a process never leaves


class Pair:
    """Starts the two processes when they are first called, and anew after one of them has failed."""

    def __init__(self) -> None:
        self._pools: list[ProcessPoolExecutor] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module on both; the list of both results."""
        if not self._pools:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            self._pools = [ProcessPoolExecutor(1, ready_context(), _join, (number, port)) for number in range(2)]
        answers = [pool.submit(function, *arguments) for pool in self._pools]
        try:
            for done in wait(answers, PATIENCE, FIRST_EXCEPTION).done:
                done.result()
            return [answer.result(0) for answer in answers]
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        for process in [process for pool in self._pools for process in pool._processes.values()]:
            process.kill()
        self._pools = []


@contextmanager
def process_pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


def _join(number: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    _group.enter_context(process_group(torch.device("cpu")))
