"""The one training loop: epochs, evaluation, checkpoints, resuming. It knows nothing of teachers and losses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from datasets import Data
from datasets.batch import Batch
from datasets.loading.order import derive_seed
from utils.config import Config
from utils.errors import UserError
from utils.processes.group import Agreement, barrier, gather_objects, is_main, rank, world_size
from utils.processes.stopping import Interrupted, StopRequest
from utils.run_folder.folder import RunDir
from utils.run_folder.resume import Progress
from utils.training.accuracy import evaluate
from utils.training.cuda_graph import CudaRecorder, choose_recorder
from utils.training.device import keep_threads, rng_state
from utils.training.doubts import no_progress
from utils.training.log import log
from utils.training.meter import Meter, not_finite
from utils.training.precision import autocast
from utils.training.reporter import Reporter, progress_bar, summary
from utils.training.state import RunState
from utils.training.step import CapturedStep, EagerStep, Phase

LONG_SECONDS = 300.0  # a run that takes longer says how long
WARM_UP, TIMED = 5, 10  # steps; a step may be recorded as a CUDA graph in the first ones


class Engine(RunState):
    """Trains phase after phase and leaves a checkpoint behind from which any step can be redone exactly.

    On several processes each has an engine of its own, and all of them take the same steps together. `start` comes
    first, then `fit`. See `RunState` for the arguments.
    """

    def __init__(self, phases: list[Phase], data: Data, run: RunDir, config: Config, device: torch.device):
        super().__init__(phases, data, run, config, device)
        self.report: Reporter | None = None  # of the first process, which alone writes
        self._bar = tqdm(disable=True)
        self._autocast = partial(autocast, device, config.training.precision)
        self._agreed = Agreement()
        self._recorder: CudaRecorder | None = None
        self._take_step: EagerStep | CapturedStep | None = None  # of the phase under way
        self._seconds_per_step: float | None = None
        self._timed_from: float | None = None  # when the steps of the warm-up were done
        self._duration_known = False  # from the end of the first epoch on, the line of each epoch says what is left
        if rank():  # all processes build the same, but each draws gates and negatives of its own
            torch.manual_seed(derive_seed(config.training.seed, rank(), 1))

    def start(self, checkpoint: dict[str, Any] | None = None) -> Engine:
        """Go back to a checkpoint, and open the log files, from which records of later epochs are dropped.

        Args:
            checkpoint: the one to go on from; None to start at the beginning.

        Raises:
            UserError: the checkpoint is not of this configuration; no file is touched then.
        """
        if checkpoint is not None:
            self.load_state_dict(checkpoint)
        if is_main():
            self.run.prune(self.config.training.keep_checkpoints)  # a run that was killed may not have done it
            self.report = Reporter(self.run, resumed_at=self._global_epoch())
        self._recorder = choose_recorder(self.config.training.cuda_graph, self.device, self.task, log.info)
        if checkpoint is None:
            return self
        if len(checkpoint["processes"]) != world_size():
            log.info(
                f"resumed on {world_size()} instead of {len(checkpoint['processes'])} processes: the batches stay the "
                "same, their division among processes and the gates' random draws do not"
            )
        elif line := keep_threads(self.device, checkpoint.get("threads")):
            log.info(line)
        return self

    def fit(self, stop: StopRequest) -> dict[str, Any]:
        """Run the epochs that are left.

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
                self._fit_epoch(stop)
            self._agreed.end()
        finally:
            self._bar.close()
            if self.report:
                self.report.close()
        names = ("top1", "top5", "class_mean")
        last = {f"last_{name}": self.val[name] for name in names if name in self.val}
        last |= {f"ema_last_{name}": self.val[f"ema/{name}"] for name in names if f"ema/{name}" in self.val}
        best = {f"best_{name}": value for name, value in self.best.items()}
        return best | last | {"checkpoint": str(self.run.best)}

    def _fit_epoch(self, stop: StopRequest) -> None:
        phase, started = self.phase, time.monotonic()
        for step in self._steps():
            self._log_interval(step)
            every = self.config.training.save_every_steps
            if every and step % every == 0:
                self._raise_if_not_finite(self.meter.means())
                self.save(is_best=False)
            self._save_and_stop_if_asked(stop)
        means = self.meter.means()
        self._raise_if_not_finite(means)
        epoch = self._global_epoch() + 1
        record = {
            "phase": phase.name,
            "epoch": self.progress.epoch + 1,
            "epochs": phase.epochs,
            "global_epoch": epoch,
            "lr": {name: optimizer.lr_at(self.progress.epoch) for name, optimizer in phase.optimizers.items()},
            "train": means,
        }
        is_best = False
        if phase.name == "train":
            is_best = self._validate(stop)
            record["val"] = self.val
        self.run.refuse_if_lost()
        if phase.name == "train":
            every, is_last = self.config.training.gate_samples_freq, self.progress.epoch + 1 == phase.epochs
            self.gates.end_epoch(self.run, epoch, samples=is_last or bool(every and epoch % every == 0))
        self._advance()
        left = self._seconds_left(self._seconds_per_step)
        if self.report:
            self.report.end_epoch(record | {"seconds": time.monotonic() - started}, left)
        self.save(is_best=is_best)
        if self._agreed(stop.requested) and self.progress.epoch < self.phase.epochs:
            raise self._interruption()

    def _steps(self) -> Iterator[int]:
        """Take the steps of the epoch that are left; yields, after each, how many have been taken."""
        phase = self.phase
        phase.task.train()
        phase.task.start_epoch(self.progress.epoch)
        for optimizer in phase.optimizers.values():
            optimizer.start_epoch(self.progress.epoch)
        started, done = time.monotonic(), self.progress.step
        self._bar = progress_bar(self._title(), len(self.data.train), done)
        for batch in self.data.train.epoch(self._global_epoch(), start=done):
            self._step(batch)
            self.progress.step += 1
            self._bar.update()
            self._seconds_per_step = (time.monotonic() - started) / (self.progress.step - done)
            self._log_duration(self.progress.step - done)
            yield self.progress.step
        self._duration_known = True
        self._bar.close()  # the evaluation has a bar of its own

    def _step(self, batch: Batch) -> None:
        if self._take_step is None:
            step = EagerStep(self.phase, self.meter, self.gates, self._autocast)
            self._take_step = CapturedStep(step, self._recorder, self._stay_eager) if self._recorder else step
        self._take_step(batch)

    def _log_duration(self, steps: int) -> None:
        """Log how long a long run will take, once, after its first steps. A run on a GPU waits twice for the device."""
        if self._duration_known or steps not in (WARM_UP, WARM_UP + TIMED):
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now, before = time.monotonic(), self._timed_from
        self._timed_from, self._duration_known = now, before is not None
        if before is not None and (left := self._seconds_left((now - before) / TIMED)) > LONG_SECONDS:
            about = f"{left / 3600:.0f} h" if left > 5 * 3600 else tqdm.format_interval(left)
            epochs = self._epochs_left()
            log.info(f"about {about} for {epochs} epoch{'s' * (epochs > 1)}, validation not counted")

    def _log_interval(self, step: int) -> None:
        """Show the means so far every ``training.print_iter_freq`` steps: beside the bar, or in a line without one."""
        steps = len(self.data.train)
        if step % self.config.training.print_iter_freq == 0 and step < steps:
            means = self.meter.means()
            self._raise_if_not_finite(means, weights=False)
            if self._bar.disable:
                left = tqdm.format_interval(self._seconds_left(self._seconds_per_step))
                log.info(f"{self._title()} step {step}/{steps} | {summary(means)} | left {left}")
            else:
                self._bar.set_postfix_str(summary(means))

    def _stay_eager(self, size: int | None, why: str) -> None:
        """Log that steps run eagerly, because those of the phase, or those on `size` images, cannot be captured.

        Raises:
            UserError: ``training.cuda_graph`` is true.
        """
        steps = f"{self.phase.name} on batches of {size}" if size else self.phase.name
        if self.config.training.cuda_graph is True:
            raise UserError(f"training.cuda_graph: true, but {steps} cannot be captured: {why}; auto goes on")
        log.info(f"steps of {steps} run eagerly, not as one CUDA graph: {why}")

    def _validate(self, stop: StopRequest) -> bool:
        """Evaluate the student into `val`, and keep `best` up to date; whether this epoch is the best one so far."""
        self.val, epoch = self._evaluate(stop), self.progress.epoch + 1
        by = self.config.validation.best_by
        now, before = self.val[by], self.best.get(by)  # None: not finite now; a checkpoint of an older version before
        is_best = now is not None and (before is None or now > before)
        if is_best:
            self.best = {name: self.val[name] for name in ("top1", "class_mean")} | {"epoch": epoch}
        for line in no_progress(self.best, epoch, self.data.val.labels, self.config):
            log.info(line)
        return is_best

    def _evaluate(self, stop: StopRequest) -> dict[str, float | None]:
        """The accuracies and the loss on the validation images, see `evaluate`; None for one that is not finite.

        Those of the average weights, if there are any, have names that begin with ``ema/``.
        """
        average = self.phase.average
        networks = {"": self.task.student} | ({"ema/": average.network} if average else {})
        how = (self.data.val, self.device, self._autocast, lambda: self._save_and_stop_if_asked(stop))
        found = {prefix: evaluate(network, *how) for prefix, network in networks.items()}
        means = {f"{prefix}{name}": value for prefix, values in found.items() for name, value in values.items()}
        if wrong := [name for name, value in means.items() if not math.isfinite(value)]:
            log.info(
                f"{self._title()}: {', '.join(wrong)} of the validation images is not finite, so these accuracies "
                "mean nothing. The training loss is: the running statistics of BatchNorm may not fit the weights, "
                "after steps that are too large (training.lr) or batches that are too small"
            )
        return means | dict.fromkeys(wrong)

    def _save_and_stop_if_asked(self, stop: StopRequest) -> None:
        """Save and raise `Interrupted` if a signal arrived on any process."""
        if self._agreed(stop.requested):
            self._raise_if_not_finite(self.meter.means())
            self.save(is_best=False)
            raise self._interruption()

    def _interruption(self) -> Interrupted:
        steps = f"step {self.progress.step}/{len(self.data.train)}"
        return Interrupted(
            f"stopped in {self._title()} after {steps}, all saved; the same command with --resume goes on"
        )

    def save(self, *, is_best: bool) -> None:
        """Write a checkpoint of the present state. The first process writes it, and collects the others' part first."""
        self.gates.collect()
        processes = gather_objects({"rng": rng_state(self.device), "meter": self.meter.state_dict()})
        if is_main():
            training, epoch = self.config.training, self._global_epoch()
            keep = training.save_ep_freq and self.progress.step == 0 and epoch % training.save_ep_freq == 0
            state = self.state_dict(processes)
            self.run.save(state, is_best=is_best, epoch=epoch if keep else None, keep=training.keep_checkpoints)
        barrier()  # so that every process finds the checkpoint

    def _advance(self) -> None:
        """Go on to the next epoch, or phase. The last phase is not left, so that it can be resumed with more epochs."""
        self.meter.reset()
        self.progress = Progress(self.progress.phase, self.progress.epoch + 1)
        if self.progress.epoch == self.phase.epochs and self.phase is not self.phases[-1]:
            self.meter, self._take_step = Meter(self.device), None  # another loss, under other names
            self.progress = Progress(self.progress.phase + 1, self._first_epoch(self.progress.phase + 1))

    def _raise_if_not_finite(self, means: dict[str, float], *, weights: bool = True) -> None:
        """Raise a UserError if one of the means so far, or a weight, is not finite.

        Args:
            weights: look at the weights too. This is done before every save, so that one can go on from any checkpoint.
        """
        step, wrong = 0, []
        if not all(map(math.isfinite, means.values())):
            step, names = self.meter.first_bad_step()
            causes = [name for name in names if name != "loss/total"] or names  # the parts of the sum say more
            wrong = [f"{name} {means[name]}" for name in causes]
        elif weights:
            wrong = not_finite(self.task.student.state_dict() | self.task.extra_state())
        if wrong:
            when = "at" if step else "noticed at"
            where = f"{self.phase.name} epoch {self.progress.epoch + 1} step {step or self.progress.step}"
            kept = f"the last good checkpoint is {self.run.last}" if self.run.last.exists() else "nothing is saved yet"
            key = "training.lr" if self.phase.name == "train" else "pretrain.optimizer.lr"
            raise UserError(
                f"{self.run.path}: no longer finite, {when} {where}: "
                f"{', '.join(wrong[:5])}{' and more' * (len(wrong) > 5)}; {kept}; a smaller {key} may help"
            )

    def _title(self) -> str:
        return f"{self.phase.name} {self.progress.epoch + 1}/{self.phase.epochs}"

    def _global_epoch(self) -> int:
        return sum(phase.epochs for phase in self.phases[: self.progress.phase]) + self.progress.epoch

    def _epochs_left(self) -> int:
        return sum(phase.epochs for phase in self.phases) - self._global_epoch()

    def _seconds_left(self, per_step: float | None) -> float:
        """Time of the steps that are left; evaluation is not counted."""
        return (per_step or 0.0) * (self._epochs_left() * len(self.data.train) - self.progress.step)
