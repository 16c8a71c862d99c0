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


@contextmanager
def process_pair() -> Iterator[Callable[..., list[Any]]]:
    """Calls a function of a module on two processes, and gives the list of both results.

    They are started when they are first called, and anew after one of them has failed.
    """
    pools: list[ProcessPoolExecutor] = []

    def end() -> None:
        for process in [process for pool in pools for process in pool._processes.values()]:
            process.kill()
        pools.clear()

    def call(function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not pools:
            places = places_of_two()
            pools.extend(ProcessPoolExecutor(1, ready_context(), _join, (place,)) for place in places)
        answers = [pool.submit(function, *arguments) for pool in pools]
        try:
            for done in wait(answers, PATIENCE, FIRST_EXCEPTION).done:
                done.result()
            return [answer.result(0) for answer in answers]
        except BaseException:
            end()
            raise

    yield call
    end()


def places_of_two() -> list[dict[str, str]]:
    """The variables that two processes find each other by."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    return [common | {"RANK": number, "LOCAL_RANK": number} for number in "01"]


def _join(place: dict[str, str]) -> None:
    torch.set_num_threads(1)
    os.environ.update(place)
    _group.enter_context(process_group(torch.device("cpu")))
