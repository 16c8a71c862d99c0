"""CUDA graphs: what a GPU was told once, repeated by a single launch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal

import torch
from torch import nn

from utils.errors import UserError
from utils.processes.group import world_size

REHEARSALS = 3  # libraries choose their kernels and take their memory in these, which a capture does not allow


class CudaRecorder:
    """Captures functions that do nothing but tell the GPU what to do.

    Args:
        device: the GPU, which is the current one.
    """

    def __init__(self, device: torch.device):
        self._device = device

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` a few times, capture it, and return what repeats it on the current stream.

        Repetitions work on the very tensors that the capture saw, those made inside included. Whatever Python
        computed, a number or a branch, stays as it was.

        Raises:
            RuntimeError: it waits for the GPU, or does something else that a graph cannot hold.
        """
        self._rehearse(function)
        gc.collect()  # a stream or graph that is destroyed while a capture is under way would end it
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self._device)
        try:
            # The outer context is for PyTorch 2.11, which after a failure leaves its own stream the current one.
            # "thread_local", because the thread that pins the memory of streamed images is not to be stopped.
            with torch.cuda.stream(current), torch.cuda.graph(graph, pool, capture_error_mode="thread_local"):
                function()
        except Exception as error:
            self._clean_up(pool)
            # Ending a broken capture is an error as well, raised in the place of the one that broke it.
            raise error.__context__ or error from None
        return graph.replay

    def _rehearse(self, function: Callable[[], None]) -> None:
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        try:
            # Whatever waits is found out here: a capture that fails is harder to recover from.
            with torch.cuda.stream(aside), waiting_refused():
                for _ in range(REHEARSALS):
                    function()
        finally:
            current.wait_stream(aside)

    def _clean_up(self, pool: tuple[int, int]) -> None:
        """Do what older versions (2.11) leave undone after a capture that broke off, so that eager steps can go on."""
        index = self._device.index if self._device.index is not None else torch.cuda.current_device()
        with suppress(RuntimeError):  # where it is done already
            torch._C._cuda_endAllocateToPool(index, pool)  # or no memory that two streams have used is ever free again
        generator = torch.cuda.default_generators[index]
        # Its state believes that the capture is still going on, and would draw no numbers outside; a copy does not.
        generator.graphsafe_set_state(generator.clone_state())


@contextmanager
def waiting_refused() -> Iterator[None]:
    """Let what makes the host wait for the GPU raise a RuntimeError instead."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the mode says of itself that it is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def choose_recorder(
    setting: bool | Literal["auto"], device: torch.device, tasks: Sequence[nn.Module], tell: Callable[[str], None]
) -> CudaRecorder | None:
    """What captures the training steps; None where they run eagerly.

    Args:
        setting: ``training.cuda_graph``.
        device: where `tasks` are.
        tasks: what is trained. Any module among them may refuse by an attribute ``capturable = False``.
        tell: called with a line where one might wonder why there is no graph.

    Raises:
        UserError: see `refuse_impossible`.
    """
    refuse_impossible(setting, device, tasks)
    obstacle = find_obstacle(device, tasks)
    if setting is False or obstacle:
        if setting and device.type == "cuda":
            tell(f"steps run eagerly, not as one CUDA graph: {obstacle}")
        return None
    return CudaRecorder(device)


def refuse_impossible(setting: bool | Literal["auto"], device: torch.device, tasks: Sequence[nn.Module]) -> None:
    """Raise a UserError if a graph is asked for and not possible."""
    if setting is True and (obstacle := find_obstacle(device, tasks)):
        raise UserError(f"training.cuda_graph: true, but {obstacle}; auto makes a graph where it can")


def find_obstacle(device: torch.device, tasks: Sequence[nn.Module]) -> str:
    """Why training steps cannot be captured, as a clause; empty if nothing is known to be in the way."""
    if device.type != "cuda":
        return f"this is the {device}"
    if world_size() > 1:
        return f"there are {world_size()} processes"
    modules = (module for task in tasks for module in task.modules())
    stubborn = next((module for module in modules if not getattr(module, "capturable", True)), None)
    return f"{type(stubborn).__name__} has capturable = False" if stubborn is not None else ""
