"""A stand-in for CUDA graphs on a CPU: it writes down every operation, and repeats them on the same tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


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
        operands = tree_map(alias, (arguments, options))
        result = function(*arguments, **options)
        # A view remains one, whatever is written into its base.
        if not (function.is_view or torch.Tag.inplace_view in function.tags):
            self._calls.append((function, *operands, tree_map(alias, result)))
        return result

    @torch.no_grad()
    def repeat(self) -> None:
        for function, arguments, options, result in self._calls:
            for before, now in zip(tree_leaves(result), tree_leaves(function(*arguments, **options))):
                if isinstance(before, Tensor):
                    before.copy_(now)


def alias(value: Any) -> Any:
    """The same memory, but not the same tensor, whose shape may yet be changed by an operation such as ``squeeze_``."""
    return value.detach() if isinstance(value, Tensor) else value


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
