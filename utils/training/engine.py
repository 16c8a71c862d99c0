"""The one training loop: epochs, evaluation, checkpoints, resuming. It knows nothing of teachers and losses."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
from tqdm import tqdm

from datasets import Data
from datasets.batch import Batch
from datasets.loading.order import derive_seed
from distillers.task import Task
from models.staged import StagedModel, copied
from utils.config import Config
from utils.config.changes import deciding_changes
from utils.errors import UserError, exhausted_memory, reason
from utils.files import publish_copy
from utils.processes.group import Agreement, barrier, from_main, gather_objects, is_main, rank, world_size
from utils.processes.stopping import Interrupted, StopRequest
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.run_folder.resume import FORMAT, Progress, check_checkpoint, refuse_other_classes
from utils.training.accuracy import evaluate
from utils.training.cuda_graph import choose_recorder
from utils.training.device import keep_threads, rng_state, set_rng_state
from utils.training.doubts import no_progress
from utils.training.gate_counts import GateRecorder
from utils.training.log import log
from utils.training.meter import Meter, not_finite
from utils.training.precision import autocast
from utils.training.reporter import Reporter, progress_bar, summary
from utils.training.step import CapturedStep, EagerStep, Phase

LONG_SECONDS = 300.0  # a run that takes longer says how long
WARM_UP, TIMED = 5, 10  # steps; a step may be recorded as a CUDA graph in the first ones


class Engine:
    """Trains phase after phase and leaves a checkpoint behind from which any step can be redone exactly.

    On several processes each has an engine of its own, and all of them take the same steps together.

    Args:
        phases: in order; the last one's task holds everything that is saved.
        data: the loaders.
        run: the folder, opened. Its log files lose the records of epochs after the checkpoint.
        config: travels in the checkpoint.
        device: where the tasks and the data are.
        checkpoint: to go on from; None to start at the beginning.

    Attributes:
        progress: the phase, epoch and step that come next.
        meter: sums of the epoch under way.
        gates: counts of the gates.
        val: means of the last validation.
        best: accuracies and number of the best epoch, which counts from 1.

    Raises:
        UserError: the checkpoint is not of this configuration; no file is touched then.
    """

    def __init__(
        self,
        phases: list[Phase],
        data: Data,
        run: RunDir,
        config: Config,
        device: torch.device,
        checkpoint: dict[str, Any] | None = None,
    ):
        self.phases, self.data, self.run, self.config, self.device = phases, data, run, config, device
        self.task: Task = phases[-1].task
        self.progress = Progress(epoch=self._first_epoch(0))
        self.meter = Meter(device)
        self.gates = GateRecorder(list(self.task.gate_labels), data.source.num_classes, data.train.num_samples, device)
        self.val: dict[str, float | None] = {}
        self.best: dict[str, float] = {"top1": -1.0, "epoch": 0}
        self._changed_data: list[str] = []  # what is different about the validation images since the checkpoint
        self._autocast = autocast(device, config.training.precision)
        self._agreed = Agreement()
        self._take_step: EagerStep | CapturedStep | None = None  # of the phase under way
        self._seconds_per_step: float | None = None
        self._timed_from = 0.0  # when the steps of the warm-up were done
        if rank():  # all processes build the same, but each draws gates and negatives of its own
            torch.manual_seed(derive_seed(config.training.seed, rank(), 1))
        if checkpoint is not None:
            self._go_back_to(checkpoint)
        self._recorder = choose_recorder(config.training.cuda_graph, device, self.task, log.info)
        self._resumed_at = self._global_epoch()
        self.report: Reporter | None = None  # of the first process, which alone writes
        if is_main():
            run.prune(config.training.keep_checkpoints)  # a run that was killed may not have done it
            self.report = Reporter(run, self._resumed_at)

    @property
    def phase(self) -> Phase:
        """The phase under way."""
        return self.phases[self.progress.phase]

    def _go_back_to(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `save` wrote."""
        what = f"{self.run.path}: its checkpoint"
        refuse_other_classes(checkpoint, self.data.source, what)
        epochs, images = [phase.epochs for phase in self.phases], self.data.train.num_samples
        check_checkpoint(checkpoint, self.config.to_dict(), epochs, images, self.run.path)
        try:
            self.progress = Progress(**checkpoint["progress"])
            self.task.student.load_state_dict(checkpoint["model"])
            self.task.load_extra_state(checkpoint["extra"])
            if self.phase.average:  # the run may have begun without one
                self.phase.average.network.load_state_dict(checkpoint.get("ema", checkpoint["model"]))
            for name, item in self.phase.optimizers.items():
                item.load_state_dict(checkpoint["optimizers"][name])
            if is_main():
                self.gates.load_state_dict(checkpoint["gates"])
            self.val, self.best = dict(checkpoint["val"]), dict(checkpoint["best"])
            self.meter.load_state_dicts([process["meter"] for process in checkpoint["processes"]])
            for process in checkpoint["processes"][rank() : rank() + 1]:  # none if there are more now
                set_rng_state(process["rng"], self.device)
        except Exception as error:
            if exhausted_memory(error):
                raise
            changes = deciding_changes(checkpoint.get("config"), self.config.to_dict())
            why = "; ".join(filter(None, [changes, reason(error, 240)]))
            raise UserError(f"{what} is not of this configuration ({why})") from error
        before = checkpoint.get("data", {})
        self._changed_data = [key for key, now in self._describe_data().items() if before.get(key, now) != now]
        if is_main() and self.best["epoch"] and not self.run.best.exists():
            self._replace_lost_best()
        if len(checkpoint["processes"]) != world_size():
            log.info(
                f"resumed on {world_size()} instead of {len(checkpoint['processes'])} processes: the batches stay the "
                "same, their division among processes and the gates' random draws do not"
            )
        elif line := keep_threads(self.device, checkpoint.get("threads")):
            log.info(line)

    def _replace_lost_best(self) -> None:
        """Choose the best epoch anew, as the user has deleted ``best.pth``.

        It is that of the checkpoint that the run goes on from, or the next one if this was written within an epoch.
        """
        self.best = {"top1": -1.0, "epoch": 0}
        if self.progress.step == 0 and self.val.get("top1") is not None:
            publish_copy(self.run.last, self.run.best)
            self.best = accuracies(self.val) | {"epoch": self.progress.epoch}
        first = self.best["epoch"] or self.progress.epoch + 1
        log.warning("%s is gone; the best epoch is chosen anew, from epoch %d on", self.run.best, first)

    def _evaluate_best_again(self) -> None:
        """So that later epochs are compared with the best one on the same images."""
        self.best |= accuracies(evaluate(self.best_student(), self.data.val, self.device, self._autocast))
        log.warning(
            f"validation is not as before ({', '.join(self._changed_data)}): the best epoch, {self.best['epoch']}, has "
            f"{self.best['top1']:.2f}% now"
        )

    def best_student(self) -> StagedModel:
        """The student of the best epoch."""
        weights = from_main(read_checkpoint(self.run.best)["model"] if is_main() else None)
        student = copied(self.task.student)
        student.load_state_dict(weights)
        return student

    def _describe_data(self) -> dict[str, Any]:
        return self.data.source.describe() | {"val_images": self.data.val.num_samples}

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
            if self.progress.epoch < self.phase.epochs:
                if from_main(bool(self._changed_data and self.best["epoch"])):
                    self._evaluate_best_again()
                if is_main():
                    self.run.result.unlink(missing_ok=True)  # of a shorter run, which now goes on
            while self.progress.epoch < self.phase.epochs:
                self._fit_epoch(stop)
            self._agreed.end()
        finally:
            if self.report:
                self.report.close()
        names = ("top1", "top5", "class_mean")
        last = {f"last_{name}": self.val[name] for name in names if name in self.val}
        last |= {f"ema_last_{name}": self.val[f"ema/{name}"] for name in names if f"ema/{name}" in self.val}
        best = {f"best_{name}": value for name, value in self.best.items()}
        return best | last | {"checkpoint": str(self.run.best)}

    def _fit_epoch(self, stop: StopRequest) -> None:
        phase, started = self.phase, time.monotonic()
        self._take_steps(stop)
        means = self._finite_means()
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

    def _take_steps(self, stop: StopRequest) -> None:
        """Take the steps of the epoch that are left, and do what is due after each."""
        phase, every = self.phase, self.config.training.save_every_steps
        phase.task.train()
        phase.task.start_epoch(self.progress.epoch)
        for optimizer in phase.optimizers.values():
            optimizer.start_epoch(self.progress.epoch)
        started, done = time.monotonic(), self.progress.step
        with progress_bar(self._title(), len(self.data.train), done) as bar:
            for batch in self.data.train.epoch(self._global_epoch(), start=done):
                self._step(batch)
                self.progress.step += 1
                bar.update()
                self._seconds_per_step = (time.monotonic() - started) / (self.progress.step - done)
                self._log_duration(self.progress.step - done)
                self._log_interval(bar)
                if every and self.progress.step % every == 0:
                    self.save(is_best=False)
                self._save_and_stop_if_asked(stop)

    def _step(self, batch: Batch) -> None:
        if self._take_step is None:
            step = EagerStep(self.phase, self.meter, self.gates, self._autocast)
            self._take_step = CapturedStep(step, self._recorder, self._stay_eager) if self._recorder else step
        self._take_step(batch)

    def _log_duration(self, steps: int) -> None:
        """Log how long a long run will take, once, after its first steps. A run on a GPU waits twice for the device."""
        # The line of each epoch says what is left from then on.
        if steps not in (WARM_UP, WARM_UP + TIMED) or self._global_epoch() != self._resumed_at:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        began, self._timed_from = self._timed_from, time.monotonic()
        left = self._seconds_left((self._timed_from - began) / TIMED)
        if steps > WARM_UP and left > LONG_SECONDS:
            about = f"{left / 3600:.0f} h" if left > 5 * 3600 else tqdm.format_interval(left)
            epochs = self._epochs_left()
            log.info(f"about {about} for {epochs} epoch{'s' * (epochs > 1)}, validation not counted")

    def _log_interval(self, bar: tqdm) -> None:
        """Show the means so far every ``training.print_iter_freq`` steps: beside the bar, or in a line without one."""
        step, steps = self.progress.step, len(self.data.train)
        if step % self.config.training.print_iter_freq == 0 and step < steps:
            means = self._finite_means(weights=False)
            bar.set_postfix_str(summary(means))
            if bar.disable:
                left = tqdm.format_interval(self._seconds_left(self._seconds_per_step))
                log.info(f"{self._title()} step {step}/{steps} | {summary(means)} | left {left}")

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
        now, before = self.val[by], self.best.get(by, -1.0)  # before the first epoch, there is no class_mean
        is_best = now is not None and now > before
        if is_best:
            self.best = accuracies(self.val) | {"epoch": epoch}
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
            self.save(is_best=False)
            raise self._interruption()

    def _interruption(self) -> Interrupted:
        steps = f"step {self.progress.step}/{len(self.data.train)}"
        return Interrupted(
            f"stopped in {self._title()} after {steps}, all saved; the same command with --resume goes on"
        )

    def save(self, *, is_best: bool) -> None:
        """Write a checkpoint of the present state. The first process writes it, and collects the others' part first."""
        self._finite_means()  # so that one can go on from every checkpoint
        self.gates.collect()
        processes = gather_objects({"rng": rng_state(self.device), "meter": self.meter.state_dict()})
        if is_main():
            training, epoch = self.config.training, self._global_epoch()
            keep = training.save_ep_freq and self.progress.step == 0 and epoch % training.save_ep_freq == 0
            state = {
                "format": FORMAT,
                "model": contiguous(self.task.student.state_dict()),
                "extra": self.task.extra_state(),
                "optimizers": {name: item.state_dict() for name, item in self.phase.optimizers.items()},
                "processes": processes,
                "progress": asdict(self.progress),
                "gates": self.gates.state_dict(),
                "val": self.val,
                "best": self.best,
                "threads": torch.get_num_threads(),
                "data": self._describe_data(),
                "config": self.config.to_dict(),
            }
            if self.phase.average:
                state["ema"] = contiguous(self.phase.average.network.state_dict())
            self.run.save(state, is_best=is_best, epoch=epoch if keep else None, keep=training.keep_checkpoints)
        barrier()  # so that every process finds the checkpoint

    def _advance(self) -> None:
        """Go on to the next epoch, or phase. The last phase is not left, so that it can be resumed with more epochs."""
        self.meter.reset()
        self.progress = Progress(self.progress.phase, self.progress.epoch + 1)
        if self.progress.epoch == self.phase.epochs and self.phase is not self.phases[-1]:
            self.meter, self._take_step = Meter(self.device), None  # another loss, under other names
            self.progress = Progress(self.progress.phase + 1, self._first_epoch(self.progress.phase + 1))

    def _finite_means(self, *, weights: bool = True) -> dict[str, float]:
        """The means of the epoch so far; raises a UserError if one of them, or a weight, is not finite.

        Args:
            weights: look at them as well.
        """
        means, step = self.meter.means(), 0
        wrong = not_finite(self.task.student.state_dict() | self.task.extra_state()) if weights else []
        if not all(map(math.isfinite, means.values())):
            step, names = self.meter.first_bad_step()
            causes = [name for name in names if name != "loss/total"] or names  # the parts of the sum say more
            wrong = [f"{name} {means[name]}" for name in causes]
        if wrong:
            when = "at" if step else "noticed at"
            where = f"{self.phase.name} epoch {self.progress.epoch + 1} step {step or self.progress.step}"
            kept = f"the last good checkpoint is {self.run.last}" if self.run.last.exists() else "nothing is saved yet"
            key = "training.lr" if self.phase.name == "train" else "pretrain.optimizer.lr"
            advice = f"a smaller {key} may help"
            gates = [name for name in wrong if name.startswith("gate/")]
            if gates and not any(name.startswith("loss/ce ") for name in wrong):  # the student itself is well
                wrong, advice = gates, "the policy must give 0 or 1; if it learns, a smaller training.lr_agent may help"
            raise UserError(
                f"{self.run.path}: no longer finite, {when} {where}: "
                f"{', '.join(wrong[:5])}{' and more' * (len(wrong) > 5)}; {kept}; {advice}"
            )
        return means

    def _first_epoch(self, phase: int) -> int:
        return self.config.training.init_epoch if phase == len(self.phases) - 1 else 0

    def _title(self) -> str:
        return f"{self.phase.name} {self.progress.epoch + 1}/{self.phase.epochs}"

    def _global_epoch(self) -> int:
        return sum(phase.epochs for phase in self.phases[: self.progress.phase]) + self.progress.epoch

    def _epochs_left(self) -> int:
        return sum(phase.epochs for phase in self.phases) - self._global_epoch()

    def _seconds_left(self, per_step: float | None) -> float:
        """Time of the steps that are left; evaluation is not counted."""
        return (per_step or 0.0) * (self._epochs_left() * len(self.data.train) - self.progress.step)


def accuracies(means: dict[str, float | None]) -> dict[str, float | None]:
    """Those by which the best epoch may be chosen."""
    return {name: means[name] for name in ("top1", "class_mean") if name in means}


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As a checkpoint has it, whatever the layout that a network computes in."""
    return {name: value.contiguous() for name, value in state.items()}
