"""Settings shared by all tests."""

import os

# Before PyTorch starts its pools: results do not depend on the machine, and parallel test processes do not fight.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import logging
import re
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from stand_in import build, call_there, find_obstacle, made_once

from utils.config import Config
from utils.processes.stopping import STOP_SIGNALS


def is_for_a_gpu(config) -> bool:
    """``-m gpu`` or the like."""
    return bool(re.search(r"(?<!not )\bgpu\b", config.option.markexpr))


def pytest_configure(config):
    """A GPU is seen by the tests for one alone: all others do the same on every machine."""
    if not is_for_a_gpu(config):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Tests on a GPU run in one process, not in one per core of the CPU, each with a CUDA context of its own."""
    return 0 if is_for_a_gpu(config) else None


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and with one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_log():
    """No test sees the handlers and the level that a run in another test has left."""
    log = logging.getLogger("sakd")
    log.handlers.clear()
    log.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True)
def _same_signal_handlers():
    """`guarded`, called within a test, ignores signals from its end on, which is that of a process elsewhere."""
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def stand_in(request) -> Callable[..., Any]:
    """``stand_in(function, *arguments)`` calls it in a process that sees a GPU; skips where there can be none."""
    if obstacle := find_obstacle():
        pytest.skip(f"a stand-in for a GPU {obstacle}")
    return partial(call_there, build(Path(request.config.cache.mkdir("fakecuda"))))


@pytest.fixture(scope="session")
def once(tmp_path_factory) -> Callable[[str, Callable[[], Any]], Any]:
    """``once(name, make)`` calls `make` in a single one of the session's processes; all of them get its result."""
    folder = tmp_path_factory.getbasetemp()
    return partial(made_once, folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder)


@pytest.fixture(scope="session")
def trained_run(once, tmp_path_factory) -> Path:
    """The folder of a distilled run as training leaves it; the session has one, which nobody changes."""
    return Path(once("trained-run", lambda: str(train_a_pair(tmp_path_factory.mktemp("trained")))))


def train_a_pair(root: Path) -> Path:
    """Train resnet8 on digits for one epoch, and distil it into another one; the folder of the second run."""
    from utils.training.run import train  # which takes a second

    torch.set_num_threads(1)
    common = {
        "dataset": {"name": "digits", "img_h": 16, "img_w": 16},
        "training": {"epochs": 1, "batch_size": 256, "num_workers": 0, "device": "cpu"},
        "validation": {"batch_size": 256, "num_workers": 0},
        "run": {"root": str(root)},
    }
    train(Config.from_dict(common | {"model": {"name": "resnet8"}}))
    pair = {"teacher": {"name": "resnet8"}, "student": {"name": "resnet8"}}
    config = Config.from_dict(common | {"kd": pair, "kd_loss": {"name": "sp"}})
    train(config)
    return config.run_dir
