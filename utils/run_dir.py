"""The folder of a run: what is in it, who may write to it, and whether a run is there already."""

from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path
from typing import IO, Any

from utils.checkpoint import publish_copy, read_checkpoint, save_atomically
from utils.errors import UserError


class RunDir:
    """``run/<dataset>/<seed>/<name>/``: checkpoints in ``ckpt/``, ``log.txt``, ``metrics.jsonl``, ``gates.jsonl`` and
    ``gates/`` (what the gates did, see `utils.gates`), TensorBoard files, ``config.yml``, and ``result.json`` once the
    run is finished.

    Args:
        path: the folder; made if it is not there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.last = path / "ckpt" / "last.pth"
        self.previous = path / "ckpt" / "previous.pth"
        self.best = path / "ckpt" / "best.pth"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.gates = path / "gates.jsonl"
        self.gate_samples = path / "gates"
        self.tensorboard = path / "tensorboard"
        self.config = path / "config.yml"
        self.result = path / "result.json"
        self._lock: IO[str] | None = None

    def open(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Take the folder for this process.

        Returns:
            the checkpoint to go on from, or None to start at the beginning.

        Raises:
            UserError: another process is writing there; there is a run and neither `resume` nor `overwrite` is
                set; or the folder cannot be written to.
        """
        try:
            self.last.parent.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot write there ({error.strerror}); run.root=<folder> names another"
            ) from error
        if overwrite:
            self._clear()
        elif resume:
            return self._newest_checkpoint()
        else:
            self.refuse_if_taken()
        return None

    def refuse_if_taken(self) -> None:
        """Raise a UserError if there is a run in the folder."""
        if self.last.exists() or self.previous.exists():
            state = "a finished run" if self.result.exists() else "an unfinished run"
            raise UserError(
                f"{self.path}: holds {state} already; --resume goes on with it, --overwrite starts anew, "
                "another training.seed or run.root writes elsewhere"
            )

    def save(self, state: dict[str, Any], *, is_best: bool) -> None:
        """Write ``last.pth``, keep the one before as ``previous.pth``, and publish it as ``best.pth`` if it is."""
        if self.last.exists():
            publish_copy(self.last, self.previous)
        save_atomically(state, self.last)
        if is_best:
            publish_copy(self.last, self.best)

    def keep_epoch(self, epoch: int) -> None:
        """Keep the newest checkpoint under a name of its own."""
        publish_copy(self.last, self.last.with_name(f"epoch-{epoch}.pth"))

    def write_result(self, result: dict[str, Any]) -> None:
        self.result.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    def close(self) -> None:
        """Let others have the folder; the end of the process does the same."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _newest_checkpoint(self) -> dict[str, Any]:
        problem: UserError | None = None
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    return read_checkpoint(path)
                except UserError as error:
                    problem = error
        if problem:
            raise problem
        raise UserError(f"{self.path}: nothing to resume there (no ckpt/last.pth); leave out --resume to start")

    def _clear(self) -> None:
        for folder in (self.last.parent, self.tensorboard, self.gate_samples):
            shutil.rmtree(folder, ignore_errors=True)
        for file in (self.log, self.metrics, self.gates, self.config, self.result):
            file.unlink(missing_ok=True)
        self.last.parent.mkdir(parents=True)

    def _acquire_lock(self) -> None:
        # The kernel drops a flock with the process that holds it, however that process ends.
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"{self.path}: another run is writing there right now") from error
