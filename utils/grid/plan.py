"""From lists of names to the runs that a grid consists of."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from utils.config import Config, find_config
from utils.config.changes import deciding_settings, differences
from utils.config.related import SingleRun, single_run, teacher_run
from utils.errors import UserError
from utils.run_folder.layout import Layout
from utils.run_folder.read import SINGLE, is_locked, read_run

ROOT = Path(__file__).parents[2]

_DISTILLING_ONLY = ("kd.", "kd_loss.", "pretrain.")
_OWN_OPTIONS = {
    "dataset.name": "--dataset",
    "training.seed": "--seeds",
    "kd.selection": "--selections",
    "kd_loss.name": "--distillers",
    "kd.teacher.name": "--pairs",
    "kd.student.name": "--pairs",
    "model.name": "--pairs",
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: for people.
        arguments: of the entry point `script`.
        config: what these amount to.
        teacher: folder of the run that has to be finished first, if that is part of the grid.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    config: Config
    teacher: Path | None = None

    @property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def epochs(self) -> int:
        return self.config.training.epochs

    def command(self, *, resume: bool) -> list[str]:
        return [sys.executable, str(ROOT / self.script), *self.arguments, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class State:
    """What is in a job's folder.

    Attributes:
        status: ``new``, ``unfinished``, ``finished``, or ``busy`` while another process is at it.
        differs: settings that decide a result and are not the job's, e.g. ``"training.lr 0.1, now 0.05"``.
    """

    status: str
    differs: str = ""


def plan(
    dataset: str,
    selections: Sequence[str],
    distillers: Sequence[str],
    pairs: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    teacher_overrides: Sequence[str] = (),
) -> list[Job]:
    """All jobs, each folder once: per seed the teachers, then the students alone, then everything distilled.

    Args:
        selections: of ``kd.selection``, and ``single`` for the student alone.
        pairs: ``teacher-student``, or ``teacher:student`` where a name has a dash.
        overrides: ``key=value`` words for the runs; what a teacher shares with its student goes to it as well.
        teacher_overrides: ``key=value`` words for the teachers.

    Raises:
        UserError: a name or a key is wrong, or two runs of different settings have one folder; nothing has been started
            then.
    """
    for word in (*overrides, *teacher_overrides):
        if option := _OWN_OPTIONS.get(word.partition("=")[0]):
            raise UserError(f"{word}: that is said by {option}; leave it out")
    networks = [split_pair(pair) for pair in pairs]
    to_distil = [selection for selection in selections if selection != SINGLE]
    alone = [word for word in overrides if not word.startswith(_DISTILLING_ONLY)]
    jobs: list[Job] = []
    for seed in seeds:
        distilled = [
            _distilled(dataset, seed, teacher, student, distiller, [*overrides, f"kd.selection={selection}"])
            for (teacher, student), distiller, selection in product(networks, distillers, to_distil)
        ]
        teachers = [teacher_run(job.config, teacher_overrides) for job in distilled if job.teacher]
        jobs += sorted(map(_single, teachers), key=lambda job: job.name)
        if SINGLE in selections:
            jobs += [_single(single_run(dataset, seed, student, alone)) for _, student in networks]
        jobs += distilled
    _check_networks(jobs)
    found: dict[Path, Job] = {}
    for job in jobs:
        first = found.setdefault(job.folder, job)
        changes = {} if first is job else differences(*(deciding_settings(j.config.to_dict()) for j in (first, job)))
        if not changes:
            continue
        key, (before, now) = next(iter(changes.items()))
        if job.config.kd:
            raise UserError(f"{job.folder}: two runs would write there, with {key} {before} and with {now}")
        # Only a network alone has two roles, and teachers come first.
        raise UserError(
            f"{job.folder}: would be a teacher with {key} {before} and a student alone with {now}; "
            f"--teacher-arg {key}={now} makes them one run, or run single in a grid of its own, in another run.root"
        )
    return list(found.values())


def split_pair(pair: str) -> tuple[str, str]:
    """``"vgg13-vgg8"`` → ``("vgg13", "vgg8")``."""
    names = pair.split(":" if ":" in pair else "-")
    if len(names) != 2 or not all(names):
        raise UserError(f"--pairs: found {pair!r}, must be teacher-student, or teacher:student where a name has a dash")
    return names[0], names[1]


def state(job: Job) -> State:
    """How far the job is already."""
    layout = Layout(job.folder)
    if is_locked(layout):
        return State("busy")
    if layout.best.exists() and not layout.config.exists():
        return State("finished")  # weights from elsewhere, put where a teacher's are looked for
    if not layout.begun:
        return State("new")
    run = read_run(job.folder)
    if run is None:
        return State("unfinished")
    changes = differences(run.settings, deciding_settings(job.config.to_dict()))
    changes.pop("training.epochs", None)
    differs = ", ".join(f"{key} {old}, now {new}" for key, (old, new) in changes.items())
    finished = run.status == "finished" and run.epochs_done >= job.epochs
    return State("finished" if finished else "unfinished", differs)


def _check_networks(jobs: Iterable[Job]) -> None:
    """Raise a UserError if there is no network of a name."""
    from models import find_builder  # brings PyTorch, for which a wrong key need not wait

    networks = [network for job in jobs for network in (job.config.student, job.config.kd and job.config.kd.teacher)]
    for name in {network.name: None for network in networks if network}:
        find_builder(name)


def _single(run: SingleRun) -> Job:
    config = run.config
    name = f"{config.title} alone, seed {config.training.seed}"
    return Job(name, "train_single.py", run.arguments, config)


def _distilled(dataset: str, seed: int, teacher: str, student: str, distiller: str, overrides: Sequence[str]) -> Job:
    config = find_config(dataset, seed, teacher=teacher, student=student, distiller=distiller).load(overrides)
    arguments = ("--dataset", dataset, "--seed", str(seed), "--net1", teacher, "--net2", student)
    arguments = (*arguments, "--distiller", distiller, *overrides)
    name = f"{distiller} {config.kd.selection}, {teacher}-{student}, seed {seed}"
    own = None if config.kd.teacher.checkpoint else config.teacher_checkpoint.parents[1]
    return Job(name, "train.py", arguments, config, own)
