"""Real training processes, killed at random moments and resumed until they are done, end as if left alone."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import pytest
from process_runs import config_file, fingerprint, prepare, start

from utils.config import load_config
from utils.processes.stopping import EXIT_INTERRUPTED
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir

STREAMED = {"dataset": {"loader": "stream"}, "training": {"num_workers": 2}}
CHECKPOINTS = 20  # that the shortest of these runs writes
CASES = [
    ("at", "adaptive", {}),
    ("ft", "anti", {}),
    ("fsp", "adaptive", {}),
    ("crd", "random", {}),
    ("vid", "fixed", {}),
    ("nst", "adaptive", STREAMED),
    (None, "alone", {}),
]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory):
    """What runs leave behind that nobody kills."""
    folder = prepare(tmp_path_factory.mktemp("alone"))

    def get(distiller, selection, keys):
        attempt = Attempt(config_file(folder, distiller, selection, **keys))
        assert attempt.finish() == 0, attempt.errors
        return fingerprint(attempt.run)

    return get


class Attempt:
    """One process that trains, or goes on training, what a config says."""

    def __init__(self, config: Path):
        self.run = RunDir(load_config(config).run_dir)
        # A pipe would stay open for as long as orphaned workers live.
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - read after the process has ended
        self._taken = age(self.run.config)
        words = ["--resume"] if self.run.last.exists() else []
        with open(os.devnull, "w") as nowhere:
            self.process = start(config, *words, stdout=nowhere, stderr=self._errors)

    def wait_for_checkpoints(self, count: int) -> None:
        """Until it has taken the folder and written so many, or ended."""
        seen = age(self.run.last)
        self._wait_for_change(self.run.config, self._taken)
        for _ in range(count):
            seen = self._wait_for_change(self.run.last, seen)

    def finish(self) -> int:
        return self.process.wait()

    @property
    def errors(self) -> str:
        """What it wrote to standard error."""
        self._errors.seek(0)
        return self._errors.read()

    def _wait_for_change(self, path: Path, before: int | None) -> int | None:
        while age(path) == before and self.process.poll() is None:
            time.sleep(0.001)
        return age(path)


def age(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def progress(run: RunDir) -> tuple[int, ...]:
    return tuple(read_checkpoint(run.last)["progress"].values()) if run.last.exists() else (-1,)


def kill_until_done(config: Path, kills: int, rng: random.Random) -> tuple[RunDir, int]:
    """Kill attempt after attempt, each at a random moment after a random number of checkpoints; let the last finish."""
    done, number = 0, None
    while True:
        attempt = Attempt(config)
        reached = progress(attempt.run)
        if done < kills:
            attempt.wait_for_checkpoints(rng.randint(0, CHECKPOINTS // (kills + 1)))
            time.sleep(rng.uniform(0, 0.1))
            number = rng.choice([signal.SIGKILL, signal.SIGTERM])
            attempt.process.send_signal(number)
        status = attempt.finish()
        assert progress(attempt.run) >= reached, "nothing that was saved is lost"
        if attempt.run.result.exists():  # a late signal meets a process that is done and only cleans up
            assert status in (0, -signal.SIGKILL if number == signal.SIGKILL else 0), attempt.errors
            return attempt.run, done
        check_ending(status, number, attempt.errors)
        done += 1


def check_ending(status: int, number: int, errors: str) -> None:
    assert status == (-signal.SIGKILL if number == signal.SIGKILL else EXIT_INTERRUPTED), errors
    if number == signal.SIGTERM:
        assert errors.count("\n") == 1
        assert "--resume" in errors


def check(tmp_path, left_alone, case, kills):
    distiller, selection, keys = case
    config = config_file(prepare(tmp_path), distiller, selection, **keys)
    run, killed = kill_until_done(config, kills, random.Random(str(case)))
    assert killed >= kills - 2, "the others came too late"
    assert fingerprint(run) == left_alone(*case)


def test_a_run_killed_at_random_moments_ends_as_if_left_alone(tmp_path, left_alone):
    check(tmp_path, left_alone, ("ft", "adaptive", {}), kills=3)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def test_holds_for_many_kills_of_many_kinds_of_run(tmp_path, left_alone, case):
    check(tmp_path, left_alone, case, kills=5)
