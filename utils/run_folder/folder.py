"""The folder of a run, opened for writing: one process at a time, and no checkpoint is ever lost."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import weakref
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from utils.config import Config
from utils.config.changes import deciding_changes
from utils.config.yaml_text import read_yaml
from utils.errors import UserError, doing
from utils.files import UNSUPPORTED, check_regular, publish_copy, remove_leftovers, write_text
from utils.run_folder.checkpoint import read_checkpoint, save_atomically
from utils.run_folder.layout import Layout

log = logging.getLogger("sakd")

LOCK_RETRY_SECONDS = 1.0  # a process that asks whether a run is going on, see `read.is_locked`, holds the lock briefly

_locks: weakref.WeakSet[IO] = weakref.WeakSet()


def _release_locks() -> None:
    for lock in _locks:
        lock.close()


# A forked process shares the locks of its parent. Workers that decode images take seconds to notice that the run was
# killed, and would keep the folder locked meanwhile.
os.register_at_fork(after_in_child=_release_locks)


class RunDir(Layout):
    """The folder of a run that this process writes to.

    Args:
        path: the folder; made when it is opened.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self._lock: IO[str] | None = None

    def open(self, *, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Take the folder for this process.

        Returns:
            the checkpoint to go on from, or None to start at the beginning.

        Raises:
            UserError: another process is writing there; there is a run and neither `resume` nor `overwrite` is
                set; or the folder cannot be written to.
        """
        if resume:
            self.refuse_if_new()
        with doing(f"writing to {self.path}, which is below run.root,"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._acquire_lock()
            if overwrite:
                self._clear()
            for folder in (self.path, self.checkpoints, self.gate_samples):
                remove_leftovers(folder)
        if resume:
            return self._newest_checkpoint()
        self.refuse_if_taken()
        return None

    def refuse_if_new(self) -> None:
        """Raise a UserError if there is no run in the folder to go on with."""
        if not self.begun:
            raise UserError(f"{self.path}: nothing to resume there (no ckpt/last.pth); leave out --resume to start")

    def refuse_if_taken(self, wanted: Config | None = None) -> None:
        """Raise a UserError if there is a run in the folder, which says how its settings differ from the `wanted`."""
        if self.begun:
            state, changed = "a finished run" if self.result.exists() else "an unfinished run", ""
            with suppress(UserError):  # its settings cannot be read
                changed = deciding_changes(read_yaml(self.config), wanted.to_dict()) if wanted else ""
            other = f" with other settings ({changed})" if changed else ""
            raise UserError(
                f"{self.path}: holds {state} already{other}; --resume continues it, --overwrite starts anew, "
                "another training.seed or run.root writes elsewhere"
            )
        if kept := self.resumable():
            raise UserError(
                f"{self.path}: holds {kept[-1].name}, but no run that it is of (no {self.config.name}); move it away "
                "to train there, or let another training.seed or run.root write elsewhere"
            )

    def save(
        self, state: dict[str, Any], *, is_best: bool = False, epoch: int | None = None, keep: int | None = None
    ) -> None:
        """Write ``last.pth`` and keep the one before as ``previous.pth``.

        ``last.pth`` changes after everything else: a process killed in between redoes this very state.

        Args:
            state: the checkpoint.
            is_best: call it ``best.pth`` as well.
            epoch: call it ``epoch-<epoch>.pth`` as well; None: do not.
            keep: see `prune`.

        Raises:
            UserError: it cannot be written, or the folder is `lost`.
        """
        also = [self.best] if is_best else []
        if epoch is not None:
            also.append(self.epoch_checkpoint(epoch))
        self.refuse_if_lost()
        if self.last.exists():
            publish_copy(self.last, self.previous)
        save_atomically(state, self.last, also)
        self.prune(keep)

    def prune(self, keep: int | None) -> None:
        """Delete all ``epoch-*.pth`` but the newest `keep`; None: none."""
        if keep is not None:
            for path in self.kept_epochs()[:-keep]:
                path.unlink()

    @property
    def lost(self) -> bool:
        """Whether the folder that this process has opened is gone: one that is there now may be another run's."""
        if self._lock is None:
            return False
        try:
            return not os.path.samestat(os.fstat(self._lock.fileno()), self.lock.stat())
        except FileNotFoundError:
            return True

    def refuse_if_lost(self) -> None:
        """Raise a UserError if the folder is `lost`; before anything is written that may fall into another run's."""
        if self.lost:
            raise UserError(
                f"{self.path}: was moved or deleted while this run was going on, or another run has taken its place; "
                "this run ends, and wrote nothing there since"
            )

    def write_result(self, result: dict[str, Any]) -> None:
        self.refuse_if_lost()
        write_text(self.result, json.dumps(result, indent=2) + "\n")

    def close(self) -> None:
        """Release the lock; the end of the process does the same."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _newest_checkpoint(self) -> dict[str, Any]:
        """The first of `resumable` that can be read."""
        problems: list[UserError] = []
        for path in dict.fromkeys((self.last, *self.resumable())):  # that `last` is gone is a problem, too
            try:
                checkpoint = read_checkpoint(path)
            except UserError as error:
                problems.append(error)
                continue
            if problems:
                log.warning("%s; going on from %s", problems[-1], path)
                publish_copy(path, self.last)  # else the next checkpoint would make the broken one the one before
            return checkpoint
        raise problems[0]

    def _clear(self) -> None:
        for folder in (self.checkpoints, self.gate_samples, self.evaluation):
            if folder.exists():
                shutil.rmtree(folder)
        for file in (self.log, self.metrics, self.gates, self.config, self.facts, self.result, *self.event_files()):
            file.unlink(missing_ok=True)
        self.checkpoints.mkdir()

    def _acquire_lock(self) -> None:
        # The kernel drops a flock with the process that holds it, however that process ends.
        for file in (self.lock, self.log, self.metrics, self.gates):  # which are opened, not replaced
            if os.path.lexists(file):
                check_regular(file, follow_links=False)  # a link may lead to any file of the user's
        self._lock = self.lock.open("a")
        _locks.add(self._lock)
        deadline = time.monotonic() + LOCK_RETRY_SECONDS
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise UserError(f"{self.path}: another run is writing there right now") from error
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                log.warning("%s: this file system has no locks; do not start a second run there", self.path)
                return
