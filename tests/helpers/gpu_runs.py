"""Engines that train toys on a GPU, be it a real one or the stand-in for one."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from pathlib import Path

import torch
from captured_steps import Training
from toy_runs import finish, toy_config
from toys import ToyNet, toy_data, toy_task

from distillers.at import AT
from distillers.task import Classification
from utils.processes.group import from_main, is_main
from utils.run_folder.folder import RunDir
from utils.training.build import make_label_loss, make_phases
from utils.training.cuda_graph import CudaRecorder
from utils.training.device import choose_device, set_up
from utils.training.engine import Engine

DEVICE = torch.device("cuda:0")
BATCH = 12  # three batches of 12 of the 40 images, and one of 4
EPOCHS = 3
STEPS = 4  # per epoch


def make_engine(
    folder, task="at", selection="adaptive", *, graph=True, device=DEVICE, workers=None, shard=(0, 1), **options
):
    """A fresh process's engine. `graph` is ``training.cuda_graph``; ``True`` refuses to go on without.

    Args:
        task: a distiller's name or class, or None for a network alone.
        options: ``resume``, or keys of ``training``.
    """
    resume = options.pop("resume", False)
    config = toy_config(**{"cuda_graph": graph, "epochs": EPOCHS, "batch_size": BATCH} | options)
    set_up(config)
    # Two runs are to choose the same kernels.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    seed = config.training.seed
    loss = make_label_loss(config)
    how = {"seed": seed, "selection": selection, "label_loss": loss}
    task = Classification(ToyNet(), loss) if task is None else toy_task(task, **how)
    task = task.to(device)
    run = RunDir(Path(folder))
    checkpoint = from_main(run.open(resume=resume, overwrite=False) if is_main() else None)
    data = toy_data(BATCH, shard, device, workers)
    return Engine(make_phases(task, config), data, run, config, device).start(checkpoint)


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
