"""Real training processes, killed at random moments and resumed until they are done, end as if left alone."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
from process_runs import STEPS, config_file, fingerprint, prepare, start

from utils.config import load_config
from utils.processes.stopping import EXIT_INTERRUPTED
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir

SHORT = {"training": {"epochs": 2, "lr_decay_epochs": [1]}, "pretrain": {"epochs": 1}}
STREAMED = {"dataset": {"loader": "stream"}, "training": {"num_workers": 2}}
CASES = [
    *(("at", "adaptive", {}), ("ft", "anti", {}), ("fsp", "adaptive", {}), ("crd", "random", {})),
    *(("vid", "fixed", {}), ("nst", "adaptive", STREAMED), (None, "alone", {})),
]


def age(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def progress(run: RunDir) -> tuple[int, ...]:
    return tuple(read_checkpoint(run.last)["progress"].values()) if run.last.exists() else (-1,)


def attempt(config: Path, run: RunDir, errors: Path, kill: tuple[int, int, float] | None) -> int:
    """Train, or go on training, in a process of its own; its exit status.

    Args:
        errors: the file that standard error goes to: a pipe would stay open for as long as orphaned workers live.
        kill: number of a signal, and after how many checkpoints and further seconds it comes; None: never.
    """
    words = ["--resume"] if run.last.exists() else []
    waited_for = [run.config, *[run.last] * (kill[1] if kill else 0)]
    with open(os.devnull, "w") as nowhere, errors.open("w") as file:
        ages = {path: age(path) for path in waited_for}
        process = start(config, *words, stdout=nowhere, stderr=file)
    for path in waited_for if kill else []:
        while age(path) == ages[path] and process.poll() is None:
            time.sleep(0.001)
        ages[path] = age(path)
    if kill:
        time.sleep(kill[2])
        process.send_signal(kill[0])
    return process.wait()


def kill_until_done(config: Path, kills: int, checkpoints: int, rng: random.Random) -> tuple[RunDir, int]:
    """Kill attempt after attempt, each at a random moment, and let the last one finish; how many kills met the run.

    Args:
        checkpoints: at least so many are written by a whole run.
    """
    run, errors = RunDir(load_config(config).run_dir), config.with_suffix(".errors")
    done = 0
    while True:
        reached = progress(run)
        number = rng.choice([signal.SIGKILL, signal.SIGTERM])
        kill = (number, rng.randint(0, checkpoints // (kills + 1)), rng.uniform(0, 0.1)) if done < kills else None
        status = attempt(config, run, errors, kill)
        said = errors.read_text()
        assert progress(run) >= reached, "nothing that was saved is lost"
        if run.result.exists():  # a late signal meets a process that is done and only cleans up
            assert status in (0, -signal.SIGKILL if kill and number == signal.SIGKILL else 0), said
            return run, done
        assert status == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_INTERRUPTED), said
        assert number == signal.SIGKILL or (said.count("\n") == 1 and "--resume" in said)
        done += 1


def check(folder: Path, case: tuple, kills: int, checkpoints: int) -> None:
    distiller, selection, keys = case
    config = config_file(prepare(folder), distiller, selection, **keys)
    run, killed = kill_until_done(config, kills, checkpoints, random.Random(str(case)))
    assert killed >= kills - 2, "the others came too late"
    alone = config_file(folder, distiller, selection, **{**keys, "run": {"root": str(folder / "alone")}})
    undisturbed = RunDir(load_config(alone).run_dir)
    assert attempt(alone, undisturbed, folder / "errors", None) == 0, (folder / "errors").read_text()
    assert fingerprint(run) == fingerprint(undisturbed)


def test_a_run_killed_at_random_moments_ends_as_if_left_alone(tmp_path):
    check(tmp_path, ("ft", "adaptive", SHORT), kills=3, checkpoints=3 * STEPS // 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_holds_for_many_kills_of_many_kinds_of_run(tmp_path, case):
    check(tmp_path, case, kills=5, checkpoints=4 * STEPS // 2)
