"""The shell launchers, run as people run them: with variables in the environment and arguments behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

from ready_process import REPOSITORY, ReadyProcess, run_module

HERE = str(Path(sys.executable).parent)
_STAND_IN = '#!/bin/sh\nprintf "%s\\0" "$@" > "$WRITTEN"\n'


def sh(script: str, *arguments: str, cwd: Path = REPOSITORY, path: str = HERE, **variables: str) -> CompletedProcess:
    """Run a launcher with the tests' own interpreter first on the path."""
    how = {"cwd": cwd, "env": _environment(path, variables), "capture_output": True, "text": True}
    return subprocess.run(["sh", script, *arguments], check=False, **how)


def handed_over(script: str, *arguments: str, cwd: Path = REPOSITORY, **variables: str) -> list[str]:
    """The arguments with which a launcher at last starts Python, for which a program stands that writes them down."""
    with TemporaryDirectory() as folder:
        stand_in, written = Path(folder, "python3"), Path(folder, "arguments")
        stand_in.write_text(_STAND_IN)
        stand_in.chmod(0o755)
        environment = _environment(folder, variables | {"WRITTEN": str(written)})
        subprocess.run(["sh", script, *arguments], cwd=cwd, env=environment, check=True)
        return written.read_text().split("\0")[:-1]


def quick_sh(script: str, *arguments: str, **variables: str) -> CompletedProcess:
    """The same as `sh`, but what the launcher starts is forked from a process that has imported PyTorch."""
    minus_m, module, *words = handed_over(script, *arguments, **variables)
    assert minus_m == "-m"
    process = ReadyProcess(run_module, module, *words, environment=_environment(HERE, variables))
    code, errors = process.ending()
    return CompletedProcess(words, code, process.stdout.read(), errors)


def _environment(path: str, variables: dict[str, str]) -> dict[str, str]:
    own = {key: value for key, value in os.environ.items() if key not in ("dataset", "seed", "model", "net1")}
    return own | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""} | variables
