"""Two processes in one group, which run the functions that they are told to."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from ready_process import ready_context

from utils.processes.group import process_group

PATIENCE = 100  # seconds


class Pair:
    """Starts the two processes when they are first called, and anew after one of them has failed."""

    def __init__(self) -> None:
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call a function of a module on both; the list of both results."""
        if not self._processes:
            self._start()
        for pipe in self._pipes:
            pipe.send((function, arguments))
        try:
            return self._answers()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        context = ready_context()
        for number in range(2):
            here, there = context.Pipe()
            self._pipes.append(here)
            self._processes.append(context.Process(target=_do_as_told, args=(there, number, port), daemon=True))
            self._processes[-1].start()

    def _answers(self) -> list[Any]:
        answers: dict[Connection, Any] = {}
        while len(answers) < 2:
            ready = wait([pipe for pipe in self._pipes if pipe not in answers], PATIENCE)
            assert ready, "the two processes wait for each other"
            for pipe in ready:
                answers[pipe], problem = pipe.recv()
                assert problem is None, problem
        return [answers[pipe] for pipe in self._pipes]


@contextmanager
def process_pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.end()


def _do_as_told(pipe: Connection, number: int, port: int) -> None:
    torch.set_num_threads(1)
    place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    with process_group(torch.device("cpu")):
        while True:
            function, arguments = pipe.recv()
            try:
                pipe.send((function(*arguments), None))
            except BaseException:
                pipe.send((None, traceback.format_exc()))
