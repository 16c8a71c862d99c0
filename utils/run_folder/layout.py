"""The names of what is in the folder of a run. Nothing here opens a file."""

from __future__ import annotations

from pathlib import Path

_CHECKPOINTS = "ckpt"
CONFIG = "config.yml"


class Layout:
    """``run/<dataset>/<seed>/<name>/``.

    Args:
        path: the folder.

    Attributes:
        checkpoints: holds the checkpoints: `last`, `previous` (the one before it), `best`, and those of single epochs.
        log: what the console showed.
        metrics: a JSON line per epoch.
        gates: a JSON line per epoch of the train phase: how often each class was distilled at each spot.
        gate_samples: holds an ``.npz`` per recorded epoch: how often each sample was distilled at each spot so far.
        config: the settings of the run.
        facts: how large the data and the networks are, and the machine.
        result: the accuracies; written when the run is finished.
        lock: held by the process that writes to the folder.
        evaluation: what ``python -m utils.evaluate`` found.
        slurm_job: the number of the run's job in Slurm.
        slurm_log: what it printed there.
    """

    def __init__(self, path: Path):
        self.path = path
        self.checkpoints = path / _CHECKPOINTS
        self.last = self.checkpoints / "last.pth"
        self.previous = self.checkpoints / "previous.pth"
        self.best = self.checkpoints / "best.pth"
        self.log = path / "log.txt"
        self.metrics = path / "metrics.jsonl"
        self.gates = path / "gates.jsonl"
        self.gate_samples = path / "gates"
        self.config = path / CONFIG
        self.facts = path / "facts.json"
        self.result = path / "result.json"
        self.lock = path / ".lock"
        self.evaluation = path / "evaluation"
        self.slurm_job = path / "slurm.json"
        self.slurm_log = path / "slurm.txt"

    @classmethod
    def of_checkpoint(cls, file: Path) -> Layout | None:
        """The run folder that a checkpoint is in; None if it is not in one."""
        return cls(file.parent.parent) if file.parent.name == _CHECKPOINTS else None

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to go on from."""
        # A user may have deleted all but one checkpoint. Without a config, that one may be of another program.
        return self.last.exists() or self.previous.exists() or (self.config.exists() and bool(self.resumable()))

    def resumable(self) -> list[Path]:
        """The checkpoints that are there, in the order in which a run would go on from them."""
        files = (self.last, self.previous, *reversed(self.kept_epochs()), self.best)
        return [file for file in files if file.exists()]

    def kept_epochs(self) -> list[Path]:
        """The ``epoch-*.pth``, oldest epoch first."""
        numbers = {path: epoch_number(path) for path in self.checkpoints.glob("*.pth")}
        return sorted((path for path in numbers if numbers[path] is not None), key=numbers.get)

    def event_files(self) -> list[Path]:
        """What TensorBoard shows; it calls a run by their folder."""
        return sorted(self.path.glob("events.out.tfevents.*"))

    def epoch_checkpoint(self, epoch: int | str) -> Path:
        """The checkpoint that ``training.save_ep_freq`` keeps of an epoch, phases counted together."""
        return self.checkpoints / f"epoch-{epoch}.pth"

    def epoch_gate_samples(self, epoch: int | str) -> Path:
        """The file in `gate_samples` that was written after an epoch."""
        return self.gate_samples / f"epoch-{epoch}.npz"


def epoch_number(file: Path) -> int | None:
    """The epoch in the name of a file such as ``epoch-7.pth``; None if there is none."""
    word, _, number = file.stem.partition("-")
    return int(number) if word == "epoch" and number.isascii() and number.isdecimal() and len(number) < 10 else None
