"""CUDA graphs: kernels that are captured once, and repeated by a single launch."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Literal

import torch
from torch import nn

from utils.errors import UserError
from utils.processes.group import world_size

REHEARSALS = 2  # libraries choose their kernels and take their memory in these, which a capture does not allow


class CudaRecorder:
    """Runs and captures functions that only launch work on the GPU.

    All run on one stream and allocate in one pool of memory. The next function, captured or not, reuses what one of
    them frees. So with captures a step takes about as much memory as without.

    Args:
        device: the GPU, which is the current one.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._pool: torch.cuda.MemPool | None = None
        self._spent: list[torch.cuda.MemPool] = []  # in which earlier captures are

    def run(self, function: Callable[[], None]) -> None:
        """Run `function` once, eagerly."""
        current = torch.cuda.current_stream(self._device)
        if self._pool is None:
            self._stream = side_stream(self._device)
            self._pool = torch.cuda.MemPool()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
                function()
        finally:
            current.wait_stream(self._stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Run `function` a few times, capture it, and return what repeats it on the current stream.

        Repetitions work on the very tensors that the capture saw, those made inside included. Whatever Python
        computed, a number or a branch, stays as it was.

        Raises:
            RuntimeError: it waits for the GPU, or does something else that a graph cannot hold.
        """
        with waiting_refused():  # because a capture that fails is harder to recover from
            for _ in range(REHEARSALS):
                self.run(function)
        gc.collect()  # a stream or graph that is destroyed while a capture is under way would end it
        try:
            return self._capture(function)
        except Exception as error:
            self._recover()
            # Ending a broken capture is another error, which hides the one that broke it.
            raise error.__context__ or error from None

    def _capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # "thread_local", because the thread that pins the memory of streamed images is not to be stopped.
        capture = torch.cuda.graph(graph, self._pool.id, self._stream, capture_error_mode="thread_local")
        # PyTorch 2.11 leaves the stream of a capture that fails the current one.
        with torch.cuda.stream(torch.cuda.current_stream(self._device)), capture:
            function()
        return graph.replay

    def _recover(self) -> None:
        """Capture next to nothing after a capture that failed.

        PyTorch 2.11 goes on counting that one as under way: it refuses to draw numbers, to repeat earlier captures and
        to capture in the same pool again, and aborts the process when the pool is freed.
        """
        try:
            self._end_recording()
            self._capture(lambda: torch.zeros((), device=self._device))
        except RuntimeError:
            self._end_recording()
            self._spent.append(self._pool)
            self._pool = torch.cuda.MemPool()
            self._capture(lambda: torch.zeros((), device=self._device))

    def _end_recording(self) -> None:
        with suppress(RuntimeError):  # it has ended, as it should
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool.id)

    def release(self) -> None:
        """Free the memory of everything that was recorded; it cannot be repeated any more."""
        self._pool = None
        self._spent.clear()
        gc.collect()  # a step that broke off may have left its tensors in reference cycles
        torch.cuda.empty_cache()


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    """The one that all recorders use: libraries keep memory for every stream that they have ever seen."""
    return torch.cuda.Stream(device)


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
    setting: bool | Literal["auto"],
    device: torch.device,
    task: nn.Module,
    tell: Callable[[str], None] = lambda line: None,
) -> CudaRecorder | None:
    """What captures the training steps; None where they run eagerly.

    Args:
        setting: ``training.cuda_graph``.
        device: where `task` is.
        task: what is trained. Any module in it may refuse by an attribute ``capturable = False``.
        tell: called with a line where one might wonder why there is no graph.

    Raises:
        UserError: a graph is asked for and not possible.
    """
    obstacle = find_obstacle(device, task)
    if setting is True and obstacle:
        raise UserError(f"training.cuda_graph: true, but {obstacle}; auto makes a graph where it can")
    if setting is False or obstacle:
        if setting and device.type == "cuda":
            tell(f"steps run eagerly, not as one CUDA graph: {obstacle}")
        return None
    return CudaRecorder(device)


def find_obstacle(device: torch.device, task: nn.Module) -> str:
    """Why training steps cannot be captured, as a clause; empty if nothing is known to be in the way."""
    if device.type != "cuda":
        return f"this is the {device}"
    if world_size() > 1:
        return f"there are {world_size()} processes"
    if torch.cuda.get_allocator_backend() != "native":
        return "PYTORCH_CUDA_ALLOC_CONF asks for cudaMallocAsync, which has no memory for graphs alone"
    stubborn = next((module for module in task.modules() if not getattr(module, "capturable", True)), None)
    return f"{type(stubborn).__name__} has capturable = False" if stubborn is not None else ""
