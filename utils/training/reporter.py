"""Records of a run: progress bar, a log line, TensorBoard, and one JSON line per epoch."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from utils.files import append_line, write_text
from utils.processes.group import is_main
from utils.run_folder.folder import RunDir
from utils.training.log import log
from utils.training.meter import accuracy_text


def progress_bar(title: str, steps: int, done: int = 0) -> tqdm:
    """A bar on the terminal of the first process; nothing where standard error is no terminal."""
    shown = is_main() and sys.stderr.isatty()
    return tqdm(total=steps, initial=done, desc=title, leave=False, disable=not shown, unit="step")


@contextmanager
def quiet_threads() -> Iterator[None]:
    """TensorBoard's writing thread hands an error over to the next call, and then has it printed as well."""
    usual = threading.excepthook
    threading.excepthook = lambda error: None if issubclass(error.exc_type, OSError) else usual(error)
    try:
        yield
    finally:
        threading.excepthook = usual


class Reporter:
    """Writes the records of one run, in the first of its processes.

    Args:
        run: the folder of the run.
        resumed_at: number of finished epochs, phases counted together; what was recorded beyond is dropped.
    """

    def __init__(self, run: RunDir, resumed_at: int = 0):
        self.run = run
        self._keep_epochs(resumed_at)
        self._open = ExitStack()
        self._open.enter_context(quiet_threads())
        self._board = self._open.enter_context(SummaryWriter(str(run.path), purge_step=resumed_at + 1))

    def end_epoch(self, record: dict[str, Any], seconds_left: float) -> None:
        """Record an epoch.

        Args:
            record: ``phase``, ``epoch``, ``epochs``, ``global_epoch``, ``lr`` per optimiser, ``train`` and perhaps
                ``val`` means, ``seconds``.
            seconds_left: of the whole run, estimated.
        """
        append_line(self.run.metrics, json.dumps(record))
        step = record["global_epoch"]
        prefix = "" if record["phase"] == "train" else f"{record['phase']}/"
        for group in ("train", "val"):
            for name, value in record.get(group, {}).items():
                if value is None:  # not finite
                    continue
                tag = name if "/" in name else f"accuracy/{name}"
                self._board.add_scalar(
                    f"{prefix}{tag}" if name.startswith("gate/") else f"{prefix}{tag}/{group}", value, step
                )
        for name, lr in record["lr"].items():
            self._board.add_scalar(f"{prefix}lr/{name}", lr, step)
        self._board.flush()
        parts = [f"{record['phase']} {record['epoch']}/{record['epochs']}", summary(record["train"])]
        if "val" in record:
            parts.append(accuracy_text(record["val"]))
        parts += [
            f"lr {next(iter(record['lr'].values())):.4g}",
            f"{record['seconds']:.1f} s",
            f"left {tqdm.format_interval(seconds_left)}",
        ]
        log.info(" | ".join(parts))

    def close(self) -> None:
        """Close everything, even if closing something fails; where the folder is gone, TensorBoard's file may fail."""
        with suppress(OSError) if self.run.lost else nullcontext():
            self._open.close()

    def _keep_epochs(self, count: int) -> None:
        for file in (self.run.metrics, self.run.gates):
            if file.exists():
                lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
                write_text(file, "".join(line for line in lines if _epoch_of(line) <= count))


def _epoch_of(line: str) -> float:
    """``global_epoch`` of a line of the records; infinite if it was being written when the process died."""
    try:
        return float(json.loads(line)["global_epoch"]) if line.endswith("\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def summary(means: dict[str, float]) -> str:
    """One short phrase out of the means: loss, accuracy, share of samples distilled at each spot."""
    text = f"loss {means['loss/total']:.3f}"
    if "top1" in means:
        text += f" train {means['top1']:.2f}%"
    gates = {name.removeprefix("gate/"): share for name, share in means.items() if name.startswith("gate/")}
    if gates:
        text += " | distilled " + " ".join(f"{name} {100 * share:.0f}%" for name, share in gates.items())
    return text
