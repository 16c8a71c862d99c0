"""Engines that train toys, and what a test does with their runs: finish, break off, compare."""

import itertools
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from toys import CPU, ToyNet, toy_data, toy_task

from distillers.task import Classification
from utils.config import Config
from utils.processes.group import from_main, is_main, rank, world_size
from utils.processes.stopping import StopRequest
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.build import make_label_loss, make_phases
from utils.training.device import set_up
from utils.training.engine import Engine
from utils.training.log import log_to_console, log_to_file

EPOCHS = 3
STEPS = 5  # per epoch
RECIPE = {  # everything that is off by default, at once
    "optimizer": {"name": "AdamW", "options": {"betas": [0.9, 0.95]}},
    "lr": 0.01,
    "schedule": "cosine",
    "warmup_epochs": 1,
    "clip_grad_norm": 1.0,
    "label_smoothing": 0.1,
    "mixup": 0.2,
    "cutmix": 1.0,
    "ema_decay": 0.9,
}


def toy_config(**training) -> Config:
    settings = {"epochs": EPOCHS, "lr_decay_epochs": [1, 2], "print_iter_freq": 2, "batch_size": 8} | training
    pair = {"teacher": {"name": "resnet8"}, "student": {"name": "resnet8"}}
    return Config.from_dict(
        {
            "dataset": {"name": "digits"},
            "training": settings,
            "kd": pair,
            "kd_loss": {"name": "at"},
            "pretrain": {"epochs": 2},
        }
    )


def make_engine(
    folder, distiller="at", selection="adaptive", resume=False, config=None, *, data=None, device=CPU, **options
):
    """A fresh process's engine: everything is built anew, only the folder is shared.

    Args:
        distiller: its name or class; None for a network alone.
        data: `toy_data` of this process where it is not given.
        options: of the toy task.
    """
    log_to_console()
    config = config or toy_config()
    set_up(config)
    loss = make_label_loss(config)
    if distiller is None:
        task = Classification(ToyNet(), loss)
    else:
        task = toy_task(distiller, config.training.seed, selection=selection, label_loss=loss, **options)
    run, data = RunDir(Path(folder)), data or toy_data(shard=(rank(), world_size()))
    checkpoint = from_main(run.open(resume=resume, overwrite=False) if is_main() else None)
    return Engine(make_phases(task.to(device), config), data, run, config, device, checkpoint)


def assert_equal(found, expected, where="checkpoint"):
    """Compare nested checkpoints bit for bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for position, (a, b) in enumerate(zip(found, expected)):
            assert_equal(a, b, f"{where}[{position}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


def records(run):
    """metrics.jsonl without the wall-clock times."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def finish(engine):
    """Run to the end and let go of the folder, as the end of a process does."""
    try:
        with StopRequest() as stop, log_to_file(engine.run.log) if is_main() else nullcontext():
            return engine.fit(stop)
    finally:
        engine.run.close()


def gate_records(run):
    return [json.loads(line) for line in run.gates.read_text().splitlines()] if run.gates.exists() else []


def assert_same(run, expected):
    """Two runs left the same, bit for bit: checkpoints, the best weights, records of epochs and of gates."""
    assert_equal(read_checkpoint(run.last), read_checkpoint(expected.last))
    assert_equal(read_checkpoint(run.best)["model"], read_checkpoint(expected.best)["model"])
    assert records(run) == records(expected)
    assert gate_records(run) == gate_records(expected)


class PowerCut(BaseException):
    """Like kill -9: nothing gets a chance to react."""


def break_off(engine, saves):
    """Let the process of `engine` die right after its checkpoint number `saves`."""
    save, times = engine.save, itertools.count(1)

    def save_and_die(**options):
        save(**options)
        if next(times) == saves:
            raise PowerCut

    engine.save = save_and_die
    with pytest.raises(PowerCut):
        finish(engine)
    torch.manual_seed(99)  # a new process has another random state


def at_step(engine, number, *, before=lambda: None, after=lambda: None):
    """Let `engine` call something before or after its step number `number`, counted from 1."""
    step, times = engine._step, itertools.count(1)

    def step_between_calls(batch):
        is_it = next(times) == number
        if is_it:
            before()
        step(batch)
        if is_it:
            after()

    engine._step = step_between_calls
