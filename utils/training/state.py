"""The state of a run: everything that a checkpoint saves and restores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from datasets import Data
from distillers.task import Task
from utils.config import Config
from utils.config.changes import deciding_changes
from utils.errors import UserError, reason
from utils.files import publish_copy
from utils.processes.group import is_main, rank
from utils.run_folder.folder import RunDir
from utils.run_folder.networks import refuse_other_classes
from utils.run_folder.resume import FORMAT, Progress, refuse_other_images
from utils.training.device import set_rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.log import log
from utils.training.meter import Meter
from utils.training.step import Phase


class RunState:
    """Everything that changes during a run. This and the data determine the next step.

    Args:
        phases: in order; the last one's task holds everything that is saved.
        data: the loaders.
        run: the folder, opened.
        config: travels in the checkpoint.
        device: where the tasks and the data are.

    Attributes:
        progress: the phase, epoch and step that come next.
        meter: sums of the epoch under way.
        gates: counts of the gates.
        val: means of the last validation.
        best: accuracies and number of the best epoch, which counts from 1.
    """

    def __init__(self, phases: list[Phase], data: Data, run: RunDir, config: Config, device: torch.device):
        self.phases, self.data, self.run, self.config, self.device = phases, data, run, config, device
        self.task: Task = phases[-1].task
        self.progress = Progress(epoch=self._first_epoch(0))
        self.meter = Meter(device)
        self.gates = GateRecorder(list(self.task.gate_labels), data.source.num_classes, data.train.num_samples, device)
        self.val: dict[str, float | None] = {}
        self.best: dict[str, float] = {"top1": -1.0, "epoch": 0}

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.phases[self.progress.phase]

    def state_dict(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        """Everything that a run needs to go on after the last step that was taken.

        Args:
            processes: of each process, the state of its generators and its sums.
        """
        state = {
            "format": FORMAT,
            "model": {name: value.contiguous() for name, value in self.task.student.state_dict().items()},
            "extra": self.task.extra_state(),
            "optimizers": {name: item.state_dict() for name, item in self.phase.optimizers.items()},
            "processes": processes,
            "progress": asdict(self.progress),
            "gates": self.gates.state_dict(),
            "val": self.val,
            "best": self.best,
            "threads": torch.get_num_threads(),
            "data": self.data.source.describe(),
            "config": self.config.to_dict(),
        }
        return state | ({"ema": self.phase.average.state_dict()} if self.phase.average else {})

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Go back to where the checkpoint was written.

        Raises:
            UserError: the checkpoint is of other data or of another configuration.
        """
        what = f"{self.run.path}: its checkpoint"
        refuse_other_classes(checkpoint, self.data.source, what)
        refuse_other_images(checkpoint, self.data.train.num_samples, what)
        try:
            self.progress = Progress(**checkpoint["progress"])
            self.task.student.load_state_dict(checkpoint["model"])
            self.task.load_extra_state(checkpoint["extra"])
            if self.phase.average:  # the run may have begun without one
                self.phase.average.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
            for name, item in self.phase.optimizers.items():
                item.load_state_dict(checkpoint["optimizers"][name])
            if is_main():
                self.gates.load_state_dict(checkpoint["gates"])
            self.val, self.best = dict(checkpoint["val"]), dict(checkpoint["best"])
            self.meter.load_state_dicts([process["meter"] for process in checkpoint["processes"]])
            for process in checkpoint["processes"][rank() : rank() + 1]:  # none if there are more now
                set_rng_state(process["rng"], self.device)
        except Exception as error:
            changes = deciding_changes(checkpoint.get("config"), self.config.to_dict())
            why = "; ".join(filter(None, [changes, reason(error, 240)]))
            raise UserError(f"{what} is not of this configuration ({why})") from error
        self._replace_lost_best()

    def _replace_lost_best(self) -> None:
        """Choose the best epoch anew if the user has deleted ``best.pth``: it is the one of the checkpoint that the run
        goes on from, or the next one if that checkpoint was written within an epoch."""
        if not is_main() or not self.best["epoch"] or self.run.best.exists():
            return
        self.best = {"top1": -1.0, "epoch": 0}
        if self.progress.step == 0 and self.val.get("top1") is not None:
            publish_copy(self.run.last, self.run.best)
            names = [name for name in ("top1", "class_mean") if name in self.val]
            self.best = {name: self.val[name] for name in names} | {"epoch": self.progress.epoch}
        log.warning("%s is gone; the best epoch is chosen anew, from epoch %d on", self.run.best, self.progress.epoch)

    def _first_epoch(self, phase: int) -> int:
        return self.config.training.init_epoch if phase == len(self.phases) - 1 else 0
