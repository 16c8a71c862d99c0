"""Processes on a stand-in for a GPU, see tests/fakecuda/README.md."""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
SOURCES = REPOSITORY / "tests/fakecuda"
PATIENCE = 240  # seconds


def find_obstacle() -> str:
    """Why there can be no stand-in here; empty if there can."""
    if not sys.platform.startswith("linux") or not all(shutil.which(tool) for tool in ("g++", "cc", "nm")):
        return "needs Linux with a C++ compiler"
    if not (torch.version.cuda or "").startswith("13."):
        return f"stands in for CUDA 13, and this PyTorch is built with {torch.version.cuda or 'none'}"
    return ""


def build(cache: Path) -> Path:
    """The folder of the library for this PyTorch, built if it is not in `cache` yet."""
    texts = [path.read_bytes() for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".h", ".sh", ".py")]
    version = hashlib.sha256(b"".join(texts) + torch.__file__.encode() + torch.__version__.encode()).hexdigest()[:16]
    folder = cache / version
    with FileLock(cache / "lock"):
        if not (folder / "libfakecuda.so").exists():
            command = ["sh", str(SOURCES / "build.sh"), str(folder)]
            subprocess.run(command, env=os.environ | {"PY": sys.executable}, check=True, capture_output=True)
    return folder


def call_there(library: Path, function: Callable[..., Any], *arguments: Any) -> Any:
    """What ``function(*arguments)`` returns in a process that sees a GPU; both go through JSON.

    Args:
        library: folder of the library, see `build`.
        function: of a test module.
    """
    folders = [REPOSITORY, SOURCES, Path(__file__).parent, Path(sys.modules[function.__module__].__file__).parent]
    variables = {
        "PYTHONPATH": os.pathsep.join(map(str, folders)),
        "LD_LIBRARY_PATH": str(library),
        "LD_PRELOAD": str(library / "libfakecuda.so"),
        "OMP_NUM_THREADS": "1",
    }
    inherited = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        words = [__file__, function.__module__, function.__name__, json.dumps(arguments), str(answer)]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=REPOSITORY,
            env=inherited | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stdout
        return json.loads(answer.read_text())


def made_once(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returned to the first who asked for `name`; it goes through JSON.

    Args:
        folder: of the test session, whose processes share what takes long to find out.
    """
    file = folder / f"{name}.json"
    with FileLock(f"{file}.lock"):
        if not file.exists():
            file.write_text(json.dumps(make()))
    return json.loads(file.read_text())


def in_forks(function: Callable[..., Any], *arguments: Any, environments: Sequence[dict[str, str]]) -> list[Any]:
    """What ``function(*arguments)`` returns in a fork for each of `environments`, which run side by side.

    For a process that sees a GPU and has not asked for it yet: the imports, which take seconds, are shared.
    """
    fork = multiprocessing.get_context("fork")
    pools = [ProcessPoolExecutor(1, fork, os.environ.update, (variables,)) for variables in environments]
    try:
        return [answer.result(PATIENCE) for answer in [pool.submit(function, *arguments) for pool in pools]]
    finally:
        for process in [process for pool in pools for process in pool._processes.values()]:
            process.kill()


def _main(module: str, name: str, arguments: str, answer: str) -> None:
    import fakecuda

    fakecuda.patch()
    result = getattr(importlib.import_module(module), name)(*json.loads(arguments))
    Path(answer).write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
