"""A stand-in for CUDA graphs on a CPU: it writes down every operation, and repeats them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Tape(TorchDispatchMode):
    """Inside the context, every operation is executed and written down.

    As in a CUDA graph, a repetition reads and writes the tensors that the operations had when they were written down,
    and all plain numbers are those of that time.
    """

    def __init__(self):
        super().__init__()
        self._calls: list[tuple] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None) -> Any:
        options = options or {}
        # A view remains one, whatever is written into its base.
        if function.is_view or torch.Tag.inplace_view in function.tags:
            return function(*arguments, **options)
        operands = alias(arguments), {name: alias(value) for name, value in options.items()}
        result = function(*arguments, **options)
        self._calls.append((function, *operands, alias(result)))
        return result

    @torch.no_grad()
    def repeat(self) -> None:
        for function, arguments, options, result in self._calls:
            overwrite(result, function(*arguments, **options))


def alias(value: Any) -> Any:
    """The same memory, but not the same tensor, whose shape may yet be changed by an operation such as ``squeeze_``."""
    if isinstance(value, list | tuple):
        return [alias(part) for part in value]
    return value.detach() if isinstance(value, Tensor) else value


def overwrite(value: Any, now: Any) -> None:
    """Put the values of `now`, a tensor or several, into `value`."""
    if isinstance(value, list):
        for part, new in zip(value, now, strict=True):
            overwrite(part, new)
    elif isinstance(value, Tensor):
        value.copy_(now)


class TapeRecorder:
    """Does on a CPU what `utils.training.cuda_graph.CudaRecorder` does on a GPU.

    Attributes:
        recorded: how many functions.
        repeated: how often, all together.
        released: they are not repeated any more.
    """

    def __init__(self):
        self.recorded = self.repeated = 0
        self.released = False

    def run(self, function: Callable[[], None]) -> None:
        function()

    def release(self) -> None:
        self.released = True

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        function()
        tape = Tape()
        with tape:
            function()
        self.recorded += 1

        def repeat() -> None:
            self.repeated += 1
            tape.repeat()

        return repeat
