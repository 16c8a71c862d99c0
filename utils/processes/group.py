"""Training on several processes: the group that they form, and the messages in it.

Every function here may be called on a single process as well, where it does nothing and costs nothing. With more, all
processes must call each of them, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from utils.errors import doing
from utils.processes.rank import rank_info
from utils.processes.stopping import Interrupted

# Longer than the longest wait for one process, which may be unpacking a data set. The launcher notices at once that a
# process has ended.
TIMEOUT = timedelta(minutes=30)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Join the processes that torchrun started, if it did: NCCL for tensors on GPUs, gloo for others.

    After an error the group is left as it is: taking it down would wait for the other processes.
    """
    if rank_info().world == 1:
        yield
        return
    # The first step of an optimiser imports this module, whose functions have `dist.group.WORLD` as a default value. A
    # group that exists by then lives until the interpreter ends, where its threads may abort the process.
    import torch.distributed.nn.functional  # noqa: F401

    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    with doing("joining other processes, for which torchrun sets WORLD_SIZE and more,"):
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield
    except Interrupted:  # on all processes at the same step
        dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files, the first one."""
    return rank() == 0


def barrier() -> None:
    """Wait until all processes are here."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def main_first() -> Iterator[None]:
    """Let the first process through alone, then the others: it may write files that they will find."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, in the order of their numbers."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """The value of the first process."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def all_sum(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Sums over all processes, without gradient; tensors of one type, in one message."""
    if world_size() == 1:
        return tensors
    flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
    dist.all_reduce(flat)
    return _unflatten(flat, tensors)


def gather_rows(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors of one length, joined with those of the other processes along the first dimension, without gradient.

    The lengths may differ between processes. They are exchanged from host to host, so no device is waited for.
    """
    if world_size() == 1:
        return tensors
    own = torch.tensor([len(tensors[0])])
    lengths = [torch.empty_like(own) for _ in range(world_size())]
    dist.all_gather(lengths, own)
    lengths = [int(length) for length in lengths]
    joined = []
    for tensor in tensors:
        padded = tensor.new_zeros(max(lengths), *tensor.shape[1:])
        padded[: len(tensor)] = tensor.detach()
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        joined.append(torch.cat([part[:length] for part, length in zip(parts, lengths)]))
    return tuple(joined)


def _unflatten(flat: Tensor, like: Iterable[Tensor]) -> tuple[Tensor, ...]:
    like = list(like)
    parts = flat.split([tensor.numel() for tensor in like])
    return tuple(part.view_as(tensor) for part, tensor in zip(parts, like))


class Agreement:
    """Lets all processes learn at the same step that one of them wants to stop.

    The question of one step is answered at the next: the hosts' message travels while the step is computed, and no
    device is waited for. A single process has its answer at once.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, dist.Work] | None = None

    def __call__(self, wanted: bool) -> bool:
        """Ask the other processes; the result says whether any of them wanted it at the question before."""
        if world_size() == 1:
            return wanted
        answer = self.end()
        flag = torch.tensor(int(wanted))
        self._asked = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, async_op=True)
        return answer

    def end(self) -> bool:
        """Wait for the last answer: PyTorch aborts a process that exits while a message is on its way."""
        if self._asked is None:
            return False
        (flag, work), self._asked = self._asked, None
        work.wait()
        return bool(flag)


class Replica:
    """Keeps a module equal to its copies on the other processes of the group; on a single process it does nothing.

    Gradients are averaged over the processes. BatchNorm normalises by the statistics of each process's own part of the
    batch; the running statistics are those of the first process, sent to the others at the end of every step, so that
    all processes are equal between two steps, where they evaluate, save or stop.

    It is not DistributedDataParallel, which exchanges gradients at the end of a backward pass and waits for them there:
    a step here has two backward passes, and the first one's gradients travel while the second loss is computed.

    Args:
        module: in the mode in which it will be called; its parameters and buffers become those of the first process.
        trained: parameters whose gradients are averaged.
    """

    def __init__(self, module: nn.Module, trained: Iterable[nn.Parameter]):
        self._trained = list(trained)
        self._travelling: list[tuple[list[nn.Parameter], Tensor, dist.Work]] = []
        self._statistics: list[Tensor] = []
        if world_size() > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)
            layers = [layer for layer in module.modules() if isinstance(layer, _BatchNorm) and layer.training]
            means = [layer.running_mean for layer in layers if layer.track_running_stats]
            self._statistics = means + [layer.running_var for layer in layers if layer.track_running_stats]

    def send_gradients(self) -> None:
        """Send the gradients that are there and have not been sent in this step."""
        if world_size() == 1:
            return
        sent = {id(parameter) for parameters, _, _ in self._travelling for parameter in parameters}
        new = [p for p in self._trained if p.grad is not None and id(p) not in sent]
        if new:
            flat = torch.cat([parameter.grad.flatten() for parameter in new]).div_(world_size())
            self._travelling.append((new, flat, dist.all_reduce(flat, async_op=True)))

    def receive_gradients(self) -> None:
        """Replace the gradients that were sent by their averages."""
        for parameters, flat, work in self._travelling:
            work.wait()
            gradients = [parameter.grad for parameter in parameters]
            torch._foreach_copy_(gradients, _unflatten(flat, gradients))
        self._travelling.clear()

    @torch.no_grad()
    def end_step(self) -> None:
        """Make the running statistics equal; parameters are, since they started equal and had equal gradients."""
        if self._statistics:
            flat = torch.cat([statistic.flatten() for statistic in self._statistics])
            dist.broadcast(flat, src=0)
            torch._foreach_copy_(self._statistics, _unflatten(flat, self._statistics))
