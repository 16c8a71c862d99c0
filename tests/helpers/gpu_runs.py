"""Engines that train toys on a GPU, be it a real one or the stand-in for one."""

from __future__ import annotations

import gc
from contextlib import contextmanager

import torch
import toy_runs
from captured_steps import Training
from toy_runs import finish, toy_config
from toys import toy_data

from distillers.at import AT
from utils.training.cuda_graph import CudaRecorder
from utils.training.device import choose_device

DEVICE = torch.device("cuda:0")
BATCH = 12  # three batches of 12 of the 40 images, and one of 4
EPOCHS = 3


def make_engine(
    folder,
    distiller="at",
    selection="adaptive",
    *,
    graph=True,
    device=DEVICE,
    workers=None,
    shard=(0, 1),
    resume=False,
    **training,
):
    """See `toy_runs.make_engine`. `graph` is ``training.cuda_graph``; ``True`` refuses to go on without."""
    config = toy_config(**{"cuda_graph": graph, "epochs": EPOCHS, "batch_size": BATCH} | training)
    data = toy_data(BATCH, shard, device, workers)
    engine = toy_runs.make_engine(folder, distiller, selection, resume, config, data=data, device=device)
    # Two runs are to choose the same kernels.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    return engine


def trained(*arguments, **options):
    """The same, having trained to the end."""
    engine = make_engine(*arguments, **options)
    try:
        finish(engine)
    finally:
        engine.data.close()
    return engine


def is_captured(engine):
    return getattr(engine._take_step, "captured", False)


class WaitsOnlyInACapture(AT):
    """Gets through the rehearsals, and breaks the capture itself off."""

    def spot_loss(self, k, student, teacher, gate, batch):
        if torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        return super().spot_loss(k, student, teacher, gate, batch)


def steps_on_gpu(distiller="at", precision="fp32", *, captured=True, device=None, **options):
    """A toy task that takes steps, see `captured_steps.Training`."""
    device = device or choose_device("auto")
    return Training(distiller, CudaRecorder(device) if captured else None, precision, device=device, **options)


@contextmanager
def little_memory(mebibytes):
    """PyTorch may take no more than that for a while, besides what it has."""
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved() + mebibytes * 2**20
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
