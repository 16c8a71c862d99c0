"""The one training loop: epochs, evaluation, checkpoints, resuming. It knows nothing of teachers or gates."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from datasets import Data
from datasets.batch import Batch
from datasets.loading.order import derive_seed
from utils.config import Config
from utils.config.changes import deciding_changes
from utils.errors import UserError, reason
from utils.processes.group import Agreement, barrier, gather_objects, is_main, rank, world_size
from utils.processes.stopping import Interrupted, StopRequest
from utils.run_folder.folder import RunDir
from utils.run_folder.networks import refuse_other_classes
from utils.run_folder.resume import FORMAT, Progress
from utils.training.accuracy import evaluate
from utils.training.cuda_graph import CudaRecorder, choose_recorder
from utils.training.device import autocast, rng_state, set_rng_state
from utils.training.gate_counts import GateRecorder
from utils.training.meter import Meter, not_finite
from utils.training.reporter import Reporter, Silence
from utils.training.step import CapturedStep, EagerStep, Phase, make_step


class Engine:
    """Trains phase after phase and leaves a checkpoint behind from which any step can be redone exactly.

    On several processes each has an engine of its own, and all of them take the same steps together. `start` comes
    first, then `fit`.

    Args:
        phases: in order; the last one's task holds everything that is saved.
        data: the loaders.
        run: the folder, opened.
        config: travels in the checkpoint.
        device: where the tasks and the data are.
    """

    def __init__(self, phases: list[Phase], data: Data, run: RunDir, config: Config, device: torch.device):
        self.phases, self.data, self.run, self.config, self.device = phases, data, run, config, device
        self.task = phases[-1].task
        self.progress = Progress(epoch=self._first_epoch(0))
        self.meter = Meter(device)
        self.gates = GateRecorder(list(self.task.gate_labels), data.num_classes, data.train.num_samples, device)
        self._autocast = partial(autocast, device, config.training.precision)
        self.val: dict[str, float] = {}
        self.best: dict[str, float] = {"top1": -1.0, "epoch": 0}
        self._take_step: EagerStep | CapturedStep | None = None  # of the phase under way
        self._agreed = Agreement()
        self.report: Reporter = Silence()
        self._recorder: CudaRecorder | None = None
        self._seconds_per_step: float | None = None

    def start(
        self, checkpoint: dict[str, Any] | None = None, before_writing: Callable[[], None] = lambda: None
    ) -> Engine:
        """Seed this process, go back to a checkpoint, and open the log files, in this order.

        Args:
            checkpoint: what to go on from; None to start at the beginning.
            before_writing: called when the checkpoint has turned out to be one to go on from.

        Raises:
            UserError: the checkpoint is not of this configuration; no file is touched then.
        """
        if rank():  # all are built alike, but each draws gates and negatives of its own
            torch.manual_seed(derive_seed(self.config.training.seed, rank(), 1))
        if checkpoint is not None:
            self._restore(checkpoint)  # the random state too, of as many processes as there were
        before_writing()
        if is_main():
            self.report = Reporter(self.run, resumed_at=self._global_epoch())  # drops what was recorded beyond
        tasks = [phase.task for phase in self.phases]
        self._recorder = choose_recorder(self.config.training.cuda_graph, self.device, tasks, tell=self.report.line)
        if checkpoint is not None and len(checkpoint["processes"]) != world_size():
            self.report.line(
                f"resumed on {world_size()} instead of {len(checkpoint['processes'])} processes: the batches stay the "
                "same, their division among processes and the gates' random draws do not"
            )
        return self

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.phases[self.progress.phase]

    def fit(self, stop: StopRequest) -> dict[str, Any]:
        """Run what is left to run.

        Args:
            stop: asks to save and stop.

        Returns:
            ``best`` and ``last`` validation accuracies in percent, and the checkpoints' paths.

        Raises:
            Interrupted: a stop signal arrived; the state after the last whole step is saved.
            UserError: the loss is no longer finite, or a checkpoint cannot be written.
        """
        try:
            if is_main() and self.progress.epoch < self.phase.epochs:
                self.run.result.unlink(missing_ok=True)  # of a shorter run, which now goes on
            while self.progress.epoch < self.phase.epochs:
                self._fit_epoch(self.phase, stop)
            self._agreed.end()
        finally:
            self.report.close()
        names = ("top1", "top5", "class_mean")
        last = {f"last_{name}": self.val[name] for name in names if name in self.val}
        last |= {f"ema_last_{name}": self.val[f"ema/{name}"] for name in names if f"ema/{name}" in self.val}
        best = {f"best_{name}": value for name, value in self.best.items()}
        return best | last | {"checkpoint": str(self.run.best)}

    def _fit_epoch(self, phase: Phase, stop: StopRequest) -> None:
        started = time.monotonic()
        self._train_epoch(phase, stop)
        means = self.meter.means()
        self._raise_if_not_finite(phase, means)
        record = {
            "phase": phase.name,
            "epoch": self.progress.epoch + 1,
            "epochs": phase.epochs,
            "global_epoch": self._global_epoch() + 1,
            "lr": {name: optimizer.lr_at(self.progress.epoch) for name, optimizer in phase.optimizers.items()},
            "train": means,
        }
        is_best = False
        if phase.name == "train":
            record["val"] = self.val = self._evaluate(phase, stop)
            by = self.config.validation.best_by
            is_best = self.val[by] > self.best.get(by, -1.0)  # a checkpoint from before there was a choice has but top1
            if is_best:
                accuracies = {name: self.val[name] for name in ("top1", "class_mean")}
                self.best = {**accuracies, "epoch": self.progress.epoch + 1}
            epoch, every = record["global_epoch"], self.config.training.gate_samples_freq
            is_last = self.progress.epoch + 1 == phase.epochs
            self.gates.end_epoch(self.run, epoch, samples=is_last or bool(every and epoch % every == 0))
        self._advance(phase)
        self.report.end_epoch(record | {"seconds": time.monotonic() - started}, self._seconds_left())
        self.save(is_best=is_best)
        if self._agreed(stop.requested) and self.progress.epoch < self.phase.epochs:
            raise self._interruption(self.phase)

    def _evaluate(self, phase: Phase, stop: StopRequest) -> dict[str, float]:
        """See `evaluate`; of the average weights, too, if there are any, under names with ``ema/`` before them."""
        networks = {"": self.task.student} | ({"ema/": phase.average.network} if phase.average else {})
        how = (self.data.val, self.device, self._autocast, lambda: self._save_and_stop_if_asked(stop, phase))
        found = {prefix: evaluate(network, *how) for prefix, network in networks.items()}
        return {f"{prefix}{name}": value for prefix, values in found.items() for name, value in values.items()}

    def _train_epoch(self, phase: Phase, stop: StopRequest) -> None:
        phase.task.train()
        phase.task.start_epoch(self.progress.epoch)
        for optimizer in phase.optimizers.values():
            optimizer.start_epoch(self.progress.epoch)
        steps = len(self.data.train)
        title = f"{phase.name} {self.progress.epoch + 1}/{phase.epochs}"
        training = self.config.training
        self.report.start_epoch(title, steps, done=self.progress.step)
        mark, marked_step = time.monotonic(), self.progress.step
        for batch in self.data.train.epoch(self._global_epoch(), start=self.progress.step):
            phase.task.start_step(self.progress.epoch * steps + self.progress.step)
            self._step(phase, batch)
            self.progress.step += 1
            self.report.step()
            step = self.progress.step
            if step % training.print_iter_freq == 0 and step < steps:
                means = self.meter.means()
                self._raise_if_not_finite(phase, means, weights=False)
                self._seconds_per_step = (time.monotonic() - mark) / (step - marked_step)
                self.report.interval(title, step, steps, means, self._seconds_left())
            if training.save_every_steps and step % training.save_every_steps == 0:
                self._raise_if_not_finite(phase, self.meter.means())
                self.save(is_best=False)
            self._save_and_stop_if_asked(stop, phase)
        self.report.end_steps()
        if self.progress.step > marked_step:
            self._seconds_per_step = (time.monotonic() - mark) / (self.progress.step - marked_step)

    def _step(self, phase: Phase, batch: Batch) -> None:
        if self._take_step is None:
            self._take_step = make_step(phase, self.meter, self.gates, self._autocast, self._recorder, self._stay_eager)
        self._take_step(batch)

    def _stay_eager(self, why: str) -> None:
        """The steps of the phase under way cannot be captured."""
        if self.config.training.cuda_graph is True:
            raise UserError(f"training.cuda_graph: true, but {self.phase.name} cannot be captured: {why}; auto goes on")
        self.report.line(f"steps of {self.phase.name} run eagerly, not as one CUDA graph: {why}")

    def _save_and_stop_if_asked(self, stop: StopRequest, phase: Phase) -> None:
        """Save and raise `Interrupted` if a signal arrived on any process."""
        if self._agreed(stop.requested):
            self._raise_if_not_finite(phase, self.meter.means())
            self.save(is_best=False)
            raise self._interruption(phase)

    def _interruption(self, phase: Phase) -> Interrupted:
        place = f"{phase.name} {self.progress.epoch + 1}/{phase.epochs}"
        steps = f"step {self.progress.step}/{len(self.data.train)}"
        return Interrupted(f"stopped in {place} after {steps}, all saved; the same command with --resume goes on")

    def save(self, *, is_best: bool) -> None:
        """Write the checkpoint for the present progress. The first process does, with what only the others know."""
        self.gates.collect()
        processes = gather_objects({"rng": rng_state(self.device), "meter": self.meter.state_dict()})
        if is_main():
            self._write(processes, is_best=is_best)
        barrier()  # once this returns it is saved, on whichever process

    def _write(self, processes: list[dict[str, Any]], *, is_best: bool) -> None:
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
            "data": self.data.describe(),
            "config": self.config.to_dict(),
        }
        if self.phase.average:
            state["ema"] = self.phase.average.state_dict()
        training, epoch = self.config.training, self._global_epoch()
        keep = training.save_ep_freq and self.progress.step == 0 and epoch % training.save_ep_freq == 0
        self.run.save(state, is_best=is_best, epoch=epoch if keep else None, keep=training.keep_checkpoints)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            refuse_other_classes(checkpoint, self.data, f"{self.run.path}: its checkpoint")
            self._refuse_other_images(checkpoint)
            self.progress = Progress(**checkpoint["progress"])
            self.task.student.load_state_dict(checkpoint["model"])
            self.task.load_extra_state(checkpoint["extra"])
            if self.phase.average:  # which may be asked for as late as now
                self.phase.average.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
            for name, item in self.phase.optimizers.items():
                item.load_state_dict(checkpoint["optimizers"][name])
            if is_main():
                self.gates.load_state_dict(checkpoint["gates"])
            self.val, self.best = checkpoint["val"], checkpoint["best"]
            self.meter.load_state_dicts([process["meter"] for process in checkpoint["processes"]])
            for process in checkpoint["processes"][rank() : rank() + 1]:  # none if there are more now
                set_rng_state(process["rng"], self.device)
        except (KeyError, IndexError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            why = deciding_changes(checkpoint.get("config"), self.config.to_dict()) or reason(error)
            raise UserError(f"{self.run.path}: its checkpoint is not of this configuration ({why})") from error

    def _refuse_other_images(self, checkpoint: dict[str, Any]) -> None:
        """Gates are counted, and embeddings kept, for each training image by its number."""
        before, now = len(checkpoint["gates"]["sample_seen"]), self.data.train.num_samples
        if before != now:
            raise UserError(
                f"{self.run.path}: its checkpoint was trained on {before:,} images, here are {now:,}; --overwrite "
                "starts anew, another dataset.label or run.root writes elsewhere"
            )

    def _advance(self, phase: Phase) -> None:
        """Go on to the next epoch, or phase. The last phase is not left, so that it can be resumed with more epochs."""
        self.meter.reset()
        self.progress = Progress(self.progress.phase, self.progress.epoch + 1)
        if self.progress.epoch == phase.epochs and phase is not self.phases[-1]:
            self.meter, self._take_step = Meter(self.device), None  # another loss, under other names
            self.progress = Progress(self.progress.phase + 1, self._first_epoch(self.progress.phase + 1))

    def _first_epoch(self, phase: int) -> int:
        return self.config.training.init_epoch if phase == len(self.phases) - 1 else 0

    def _raise_if_not_finite(self, phase: Phase, means: dict[str, float], *, weights: bool = True) -> None:
        """Raise a UserError if one of the means so far, or a weight, is not finite.

        Args:
            weights: look at those too. Before anything is saved, so that a checkpoint is always worth going on from.
        """
        step, wrong = None, []
        if not all(map(math.isfinite, means.values())):
            step, names = self.meter.first_bad_step()
            causes = [name for name in names if name != "loss/total"] or names  # the sum of all says less
            wrong = [f"{name} {means[name]}" for name in causes]
        elif weights:
            wrong = not_finite(self.task.student.state_dict() | self.task.extra_state())
        if wrong:
            when = "at" if step else "noticed at"
            where = f"{when} {phase.name} epoch {self.progress.epoch + 1} step {step or self.progress.step}"
            kept = f"the last good checkpoint is {self.run.last}" if self.run.last.exists() else "nothing is saved yet"
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise UserError(
                f"{self.run.path}: no longer finite, {where}: {', '.join(wrong[:5])}{more}; {kept}; "
                "a smaller training.lr may help"
            )

    def _global_epoch(self) -> int:
        return sum(phase.epochs for phase in self.phases[: self.progress.phase]) + self.progress.epoch

    def _seconds_left(self) -> float:
        """Steps still to go at the pace of the last ones; evaluation is left out."""
        if self._seconds_per_step is None:
            return 0.0
        epochs = sum(phase.epochs for phase in self.phases) - self._global_epoch()
        return self._seconds_per_step * (epochs * len(self.data.train) - self.progress.step)
